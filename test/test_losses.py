"""Losses and targets against plain slow references and cases done by hand."""

import math

import numpy as np
import pytest
import torch

from waste_seg_ros.data.sample import IGNORE, OTHER
from waste_seg_ros.train.losses import (
    DistillSettings,
    LossSettings,
    binary_focal_loss,
    center_loss,
    distill_loss,
    focal_loss,
    lovasz_gradient,
    lovasz_hinge,
    lovasz_softmax,
    offset_loss,
    shrink_labels,
    total_loss,
)
from waste_seg_ros.train.targets import make_targets


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_focal_loss_against_a_loop():
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 3, 5))
    labels[0, 0, 0] = IGNORE
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    total, count = 0.0, 0
    for n in range(2):
        for i in range(3):
            for j in range(5):
                label = int(labels[n, i, j])
                if label == IGNORE:
                    continue
                exps = [math.exp(float(v)) for v in logits[n, :, i, j]]
                p = exps[label] / sum(exps)
                total += float(weights[label]) * -((1 - p) ** 2) * math.log(p)
                count += 1
    assert float(focal_loss(logits, labels, 2.0, weights)) == pytest.approx(total / count)


def test_focal_loss_with_gamma_zero_is_cross_entropy():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.allclose(focal_loss(logits, labels, 0.0), expected)


def test_binary_focal_loss_by_hand():
    # p = 0.75 for the true class in both pixels; the third is not valid.
    logits = torch.tensor([math.log(3), -math.log(3), 50.0])
    targets = torch.tensor([1.0, 0.0, 0.0])
    valid = torch.tensor([True, True, False])
    expected = 0.25**2 * -math.log(0.75)
    assert float(binary_focal_loss(logits, targets, valid)) == pytest.approx(expected, rel=1e-5)


def jaccard_loss(truth, wrong):
    """1 - intersection over union when the pixels in ``wrong`` are predicted wrongly."""
    predicted = {p for p in range(len(truth)) if bool(truth[p]) != (p in wrong)}
    positive = {p for p in range(len(truth)) if truth[p]}
    return 1 - len(predicted & positive) / len(predicted | positive)


def lovasz_extension(errors, truth):
    """The definition: sum of m_i times the growth of the set function, errors falling."""
    order = sorted(range(len(errors)), key=lambda p: -errors[p])
    total, wrong = 0.0, set()
    for p in order:
        before = jaccard_loss(truth, wrong)
        wrong = wrong | {p}
        total += errors[p] * (jaccard_loss(truth, wrong) - before)
    return total


def test_lovasz_softmax_against_the_definition():
    logits = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    labels = torch.randint(0, 2, (2, 4, 2))  # class 2 is absent
    labels[1, 0, 0] = IGNORE
    probabilities = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, 3)
    flat = labels.reshape(-1)
    keep = flat != IGNORE
    losses = []
    for c in (0, 1):
        truth = (flat[keep] == c).tolist()
        errors = [
            abs(float(t) - float(p)) for t, p in zip(truth, probabilities[keep][:, c], strict=True)
        ]
        losses.append(lovasz_extension(errors, truth))
    assert float(lovasz_softmax(logits, labels)) == pytest.approx(sum(losses) / 2)


def test_lovasz_hinge_against_the_definition():
    logits, truth = torch.randn(12, dtype=torch.float64), torch.randint(0, 2, (12,))
    valid = torch.ones(12, dtype=torch.bool)
    valid[3] = False
    kept_logits, kept = logits[valid], truth[valid]
    errors = [
        max(0.0, 1 - float(s) * (2 * int(t) - 1)) for s, t in zip(kept_logits, kept, strict=True)
    ]
    expected = lovasz_extension(errors, kept.tolist())
    assert float(lovasz_hinge(logits, truth, valid)) == pytest.approx(expected)


def test_lovasz_gradient_of_a_hand_case():
    # Two of three pixels are of the class; wrong from the most wrong on: 1/2, then 2/3, then 1.
    found = lovasz_gradient(torch.tensor([1.0, 0.0, 1.0]))
    assert torch.allclose(found, torch.tensor([1 / 2, 2 / 3 - 1 / 2, 1 - 2 / 3]))


def test_right_predictions_cost_nothing():
    labels = torch.randint(0, 3, (1, 8, 8))
    logits = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2) * 60.0
    assert float(focal_loss(logits, labels)) < 1e-6
    assert float(lovasz_softmax(logits, labels)) < 1e-6
    assert float(lovasz_hinge(logits[:, 1] - 30, labels == 1)) == 0


def test_ignored_everywhere_is_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), IGNORE)
    loss = focal_loss(logits, labels) + lovasz_softmax(logits, labels)
    loss = loss + lovasz_hinge(logits[:, 0], labels == 1, labels != IGNORE)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().sum()) == 0


def test_center_loss_by_hand():
    logits = torch.zeros(1, 1, 1, 3)
    heat = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    weight = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    # p = 0.5 everywhere: 0.5^2 ln 2 at the centre, 0.5^2 (1 - 0.5)^4 ln 2 beside it.
    expected = math.log(2) * (0.25 + 0.25 / 16)
    assert float(center_loss(logits, heat, weight)) == pytest.approx(expected, rel=1e-5)


def test_offset_loss_by_hand():
    offsets, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[32.0, 9.0]], [[-64.0, 9.0]]]])
    weight = torch.tensor([[[[0.5, 0.0]]]])
    assert float(offset_loss(offsets, target, weight)) == pytest.approx(3.0)


def blocks():
    """Two items of one class side by side, and one of unknown class, on 32 x 48."""
    labels, instances = np.zeros((32, 48), np.uint8), np.zeros((32, 48), np.uint16)
    labels[8:16, 4:28] = 2
    instances[8:16, 4:16], instances[8:16, 16:28] = 1, 7
    labels[20:30, 36:46], instances[20:30, 36:46] = OTHER, 3
    labels[30:, :20] = IGNORE
    return labels, instances


def test_targets_name_each_items_centre():
    targets = make_targets(*blocks())
    offsets, weight = targets["offsets"], targets["offset_weight"][0]
    centers = {1: (9.5, 11.5), 7: (21.5, 11.5), 3: (40.5, 24.5)}
    cells = {1: (slice(2, 4), slice(1, 4)), 7: (slice(2, 4), slice(4, 7))}
    for item, (rows, columns) in cells.items():
        y, x = np.mgrid[rows, columns] * 4 + 1.5
        assert np.allclose(x + offsets[0, rows, columns], centers[item][0])
        assert np.allclose(y + offsets[1, rows, columns], centers[item][1])
        assert np.allclose(weight[rows, columns], 1 / math.sqrt(6))
    assert weight[0].sum() == 0
    peaks = {(int(i), int(j)) for i, j in np.argwhere(targets["heat"][0] == 1)}
    assert peaks == {(3, 2), (3, 5), (6, 10)}
    assert targets["heat_weight"][0, 7, 0] == 0  # ignored
    assert targets["heat_weight"][0, 0, 0] == 1


def test_targets_against_a_slow_reference():
    rng = np.random.default_rng(3)
    instances = np.kron(rng.integers(0, 6, (8, 10)), np.ones((8, 8))).astype(np.uint16)
    labels = (instances > 0).astype(np.uint8)
    targets = make_targets(labels, instances)
    for i in range(16):
        for j in range(20):
            item = instances[4 * i + 2, 4 * j + 2]
            if item == 0:
                assert targets["offset_weight"][0, i, j] == 0
                continue
            rows, columns = np.nonzero(instances == item)
            expected = columns.mean() - (4 * j + 1.5), rows.mean() - (4 * i + 1.5)
            assert targets["offsets"][:, i, j] == pytest.approx(expected, abs=1e-4)


def test_splinters_are_no_centres():
    labels, instances = np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint16)
    labels[9:12, 9:12], instances[9:12, 9:12] = 1, 1
    targets = make_targets(labels, instances)
    assert targets["heat"].max() == 0
    assert targets["offset_weight"].max() == 0
    assert targets["heat_weight"][0, 2, 2] == 0


def test_an_empty_frame_has_targets():
    targets = make_targets(np.zeros((16, 24), np.uint8), np.zeros((16, 24), np.uint16))
    assert targets["heat"].shape == (1, 4, 6)
    assert targets["heat"].max() == 0
    assert targets["heat_weight"].min() == 1


def test_total_loss_of_perfect_outputs_is_near_zero_and_other_is_no_class():
    batch = {k: torch.from_numpy(v)[None] for k, v in make_targets(*blocks()).items()}
    labels = batch["labels"].long()
    likely = torch.where(labels < 5, labels, 0)
    semantic = torch.nn.functional.one_hot(likely, 5).permute(0, 3, 1, 2) * 40.0
    # Whatever the semantic head says of the unknown item costs nothing ...
    semantic[:, :, 20:30, 36:46] = torch.randn(1, 5, 10, 10) * 10
    # ... but the binary head must find it.
    binary = torch.where((labels > 0) & (labels != IGNORE), 30.0, -30.0)[:, None]
    outputs = {
        "semantic": semantic,
        "binary": binary,
        "centers": torch.where(batch["heat"] == 1, 30.0, -30.0),
        "offsets": batch["offsets"],
    }
    settings = LossSettings(lovasz_stride=1)
    loss, parts = total_loss(outputs, batch, settings)
    assert float(loss) < 1e-4, parts
    worse = {**outputs, "binary": torch.where(labels == OTHER, -30.0, binary[:, 0])[:, None]}
    assert float(total_loss(worse, batch, settings)[0]) > 0.1


def test_cross_entropy_to_compare_is_plain():
    batch = {k: torch.from_numpy(v)[None] for k, v in make_targets(*blocks()).items()}
    labels = batch["labels"].long()
    outputs = {"semantic": torch.randn(1, 5, 32, 48), "binary": torch.randn(1, 1, 32, 48)}
    loss, parts = total_loss(outputs, batch, LossSettings(kind="cross-entropy"))
    known = torch.where(labels == OTHER, IGNORE, labels)
    pixels = torch.nn.functional.cross_entropy(outputs["semantic"], known, ignore_index=IGNORE)
    seen = labels != IGNORE
    items = torch.nn.functional.binary_cross_entropy_with_logits(
        outputs["binary"][:, 0][seen], (labels[seen] != 0).float()
    )
    assert set(parts) == {"cross_entropy", "binary_cross_entropy"}
    assert float(loss) == pytest.approx(float(pixels + 0.2 * items), rel=1e-5)


def test_guides_are_taught_at_their_resolution():
    batch = {k: torch.from_numpy(v)[None] for k, v in make_targets(*blocks()).items()}
    labels = batch["labels"]
    outputs = {
        "semantic": torch.randn(1, 5, 32, 48),
        "guide0": torch.randn(1, 5, 8, 12, requires_grad=True),
        "guide1": torch.randn(1, 5, 4, 6),
    }
    settings = LossSettings(lovasz=0.0)
    whole, parts = total_loss(outputs, batch, settings)
    alone, _ = total_loss({"semantic": outputs["semantic"]}, batch, settings)
    # The pixel in the middle of each cell; the unknown item is ignored there too.
    small = labels[:, 2::4, 2::4].long()
    small[small == OTHER] = IGNORE
    expected = focal_loss(outputs["guide0"].detach(), small)
    assert parts["guide0"] == pytest.approx(float(expected), rel=1e-5)
    added = 0.4 * 2.0 * (parts["guide0"] + parts["guide1"])
    assert float((whole - alone).detach()) == pytest.approx(added, rel=1e-4)
    whole.backward()
    assert float(outputs["guide0"].grad.abs().sum()) > 0


def test_labels_shrink_to_the_nearest():
    labels = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    assert shrink_labels(labels, (2, 4)).tolist() == [[[17, 19, 21, 23], [49, 51, 53, 55]]]


def teaching(seed):
    torch.manual_seed(seed)
    return {
        "semantic": torch.randn(2, 3, 16, 24),
        "binary": torch.randn(2, 1, 16, 24),
        "centers": torch.randn(2, 1, 4, 6),
        "offsets": torch.randn(2, 2, 4, 6) * 30,
        "deep": torch.randn(2, 8 + seed, 2, 3),
    }


def test_nothing_is_left_to_learn_from_oneself():
    outputs = teaching(0)
    # Cosines do not see the scale of features.
    teacher = {**outputs, "deep": 3 * outputs["deep"]}
    loss, parts = distill_loss(outputs, teacher, DistillSettings())
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert set(parts) == {
        "distill_semantic",
        "distill_binary",
        "distill_features",
        "distill_centers",
        "distill_offsets",
    }
    assert set(distill_loss(outputs, {"binary": teacher["binary"]}, DistillSettings())[1]) == {
        "distill_binary"
    }


def test_distillation_by_hand():
    student, teacher = teaching(0), teaching(1)
    settings = DistillSettings(temperature=4.0, stride=1)
    _, parts = distill_loss(student, teacher, settings)
    p, q = (side["semantic"].div(4).softmax(1) for side in (teacher, student))
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    assert parts["distill_semantic"] == pytest.approx(float(expected), rel=1e-4)
    p, q = (side["binary"].div(4).sigmoid() for side in (teacher, student))
    expected = 16 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert parts["distill_binary"] == pytest.approx(float(expected), rel=1e-4)
    item = teacher["binary"][:, :, 2::4, 2::4] > 0
    off = (student["offsets"] - teacher["offsets"]).abs().sum(1, keepdim=True)[item].mean() / 32
    assert parts["distill_offsets"] == pytest.approx(float(off), rel=1e-4)
    heat = teacher["centers"].sigmoid()
    off = (student["centers"].sigmoid() - heat).square().sum() / heat.sum()
    assert parts["distill_centers"] == pytest.approx(float(off), rel=1e-4)


def test_similarities_are_of_pairs_of_places():
    # Two places of 2x2 cells each: alike for the teacher, at right angles for the student.
    student, teacher = torch.zeros(1, 2, 2, 4), torch.ones(1, 5, 2, 4)
    student[:, 0, :, :2], student[:, 1, :, 2:] = 7.0, 2.0
    _, parts = distill_loss({"deep": student}, {"deep": teacher}, DistillSettings())
    assert parts["distill_features"] == pytest.approx(0.5)


def test_classes_unknown_to_the_teacher_are_left_out():
    student, teacher = teaching(0)["semantic"].requires_grad_(), teaching(1)["semantic"]
    teacher[:, 1] = -torch.inf
    loss, _ = distill_loss(
        {"semantic": student}, {"semantic": teacher}, DistillSettings(stride=1, temperature=1.0)
    )
    p, q = (side[:, [0, 2]].softmax(1) for side in (teacher, student))
    assert float(loss.detach()) == pytest.approx(
        float((p * (p / q).log()).sum(1).mean().detach()), rel=1e-4
    )
    loss.backward()
    assert float(student.grad[:, 1].abs().max()) == 0
