"""The transfer experiment: its images, its arms and what it says of them."""

import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from waste_seg_ros.cli import main
from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER
from waste_seg_ros.data.sources import open_data
from waste_seg_ros.data.synthetic import synthetic_sample, synthetic_scene
from waste_seg_ros.files import write_png
from waste_seg_ros.models import build_model
from waste_seg_ros.runtime.bundle import save_bundle
from waste_seg_ros.train.transfer import (
    GOODS,
    TransferConfig,
    TransferError,
    markdown,
    relabelled,
    run_transfer,
    summarise,
)

SIZE = (96, 72)
SMALL = TransferConfig(images=(3,), held_out=3, steps=2, batch=2, size=(64, 48), repeats=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small are no work to share; on busy cores threads wait
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model("enet", "semantic", CLASSES, width=0.25).eval()
    return save_bundle(tmp_path_factory.mktemp("bundles") / "start", model, input_size=(64, 48))


def test_scenes_are_labelled_by_the_kind_of_each_item():
    seen = set()
    for index in range(12):
        plain, kinds = synthetic_scene(5, index, SIZE)
        again = relabelled(5, index, SIZE)
        assert np.array_equal(again.image, plain.image)
        assert np.array_equal(again.instances, plain.instances)
        for number in np.unique(plain.instances[plain.instances > 0]):
            inside = plain.instances == number
            kind = kinds[int(number)]
            wanted = [k for k, members in enumerate(GOODS.values(), 1) if kind in members]
            assert set(np.unique(again.labels[inside])) == set(wanted or [OTHER])
            # What the line's own label is comes from the kind too.
            assert (plain.labels[inside] == CLASSES.index(kind.split("/")[0]) + 1).all()
            seen.update(wanted or [OTHER])
        outside = plain.instances == 0
        assert np.array_equal(again.labels[outside], plain.labels[outside])
        assert set(np.unique(plain.labels[outside])) <= {0, IGNORE}
    assert len(seen) >= 5 and OTHER in seen


def test_kinds_do_not_change_the_scenes():
    one, other = synthetic_sample(3, 4, SIZE), synthetic_scene(3, 4, SIZE)[0]
    assert np.array_equal(one.image, other.image) and one.name == other.name


def test_no_kind_is_of_two_goods_and_no_good_is_a_known_class():
    kinds = [kind for members in GOODS.values() for kind in members]
    assert len(set(kinds)) == len(kinds)
    assert not set(GOODS) & set(CLASSES)


def test_every_arm_is_run_and_measured(bundle, tmp_path):
    report = run_transfer(replace(SMALL, bundle=str(bundle.path)), tmp_path / "run", quiet=True)
    arms = [(a["images"], a["start"], a["repeat"]) for a in report["arms"]]
    assert sorted(arms) == [
        (3, start, repeat) for start in ("bundle", "scratch") for repeat in (0, 1)
    ]
    assert all(0 <= a["miou"] <= 1 and a["frames"] == 3 for a in report["arms"])
    # Both arms of a repeat see the same images, repeats others, and none of them is held out.
    pictures = [
        {s.image.tobytes() for s in open_data(f"folder:{tmp_path / 'run' / name}", tuple(GOODS))}
        for name in ("3-images-0", "3-images-1", "held-out")
    ]
    assert [len(p) for p in pictures] == [3, 3, 3]
    assert len(set().union(*pictures)) == 9
    for start, init in (("bundle", str(bundle.path)), ("scratch", "")):
        text = (tmp_path / "run" / f"3-{start}-0" / "config.yaml").read_text()
        assert f"init: {init or chr(39) * 2}\n" in text
        assert "3-images-0" in text
    with pytest.raises(TransferError, match="not empty"):
        run_transfer(replace(SMALL, bundle=str(bundle.path)), tmp_path / "run", quiet=True)


def report_of(values):
    return {
        "config": {"images": [10, 50], "classes": ["a", "b"]},
        "bundle": "start@" + "0" * 64,
        "arms": [
            {"images": count, "start": start, "repeat": k, "miou": value}
            for (count, start), all_values in values.items()
            for k, value in enumerate(all_values)
        ],
    }


def test_the_gain_is_the_difference_of_the_means_with_its_spread():
    report = report_of(
        {
            (10, "bundle"): [0.5, 0.7],
            (10, "scratch"): [0.2, 0.3],
            (50, "bundle"): [0.8, 0.8],
            (50, "scratch"): [0.6, 0.6],
        }
    )
    ten, fifty = summarise(report)
    assert (ten["images"], fifty["images"]) == (10, 50)
    assert ten["bundle"] == pytest.approx(0.6) and ten["scratch"] == pytest.approx(0.25)
    assert ten["gain"] == pytest.approx(0.35) and ten["spread"] == pytest.approx(0.05)
    assert fifty["gain"] == pytest.approx(0.2) and fifty["spread"] == pytest.approx(0)
    assert "| 10 | 0.250 | 0.600 | +0.350 ± 0.050 |" in markdown(report)
    single = report_of({(c, s): [0.5] for c in (10, 50) for s in ("bundle", "scratch")})
    assert math.isnan(summarise(single)[0]["spread"])
    assert "| 50 | 0.500 | 0.500 | +0.000 |" in markdown(single)


def test_the_command_writes_figures_and_a_plot(bundle, tmp_path, capsys):
    output, plot = tmp_path / "transfer.json", tmp_path / "transfer.png"
    assert (
        main(
            [
                *("transfer", "--bundle", str(bundle.path), "--images", "2", "--held-out", "2"),
                *("--steps", "1", "--batch", "2", "--size", "64x48", "--output", str(output)),
                *("--plot", str(plot)),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "| labelled images | mIoU from scratch | mIoU from start | gain |" in out
    read = json.loads(output.read_text())
    assert read["summary"][0]["images"] == 2 and len(read["arms"]) == 2
    assert read["goods"]["jug"] == ["bottle/jug"]
    assert cv2.imread(str(plot)).std() > 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "60x48"], "--size 60x48: start takes multiples of 8"),
        (["--images", "0"], "must be at least 1"),
        (["--data", "folder:x", "--held-out-data", "folder:x"], "--data and --classes go together"),
        (["--data", "folder:x", "--classes", "jug"], "--data and --held-out-data go together"),
        (
            ["--data", "folder:x", "--held-out-data", "folder:x", "--classes", "paper,jug"],
            "classes paper are known to start",
        ),
        (
            ["--data", "folder:none", "--held-out-data", "folder:none", "--classes", "jug"],
            "none: has no folder images",
        ),
        (["--bundle", "nothing"], "no bundle 'nothing'"),
    ],
)
def test_what_cannot_be_is_told(bundle, flags, message, tmp_path, capsys):
    given = ["--bundle", str(bundle.path), "--size", "64x48", "--steps", "1"]
    assert main(["transfer", *given, "--output", str(tmp_path / "x.json"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_other_data_are_drawn_by_the_seed(bundle, tmp_path):
    root = tmp_path / "mine"
    for number in range(4):
        sample = relabelled(1, number, (64, 48))
        write_png(root / "images" / f"{number}.png", sample.image)
        write_png(root / "masks" / f"{number}.png", np.minimum(sample.labels, 1))
    config = replace(
        SMALL,
        bundle=str(bundle.path),
        images=(2,),
        held_out=3,
        repeats=1,
        data=f"folder:{root}",
        held_out_data=f"folder:{root}",
        classes=("thing",),
    )
    report = run_transfer(config, tmp_path / "run", quiet=True)
    assert report["goods"] == {} and "iou_thing" in report["arms"][0]
    assert len(open_data(f"folder:{tmp_path / 'run' / '2-images-0'}", ("thing",))) == 2
    with pytest.raises(TransferError, match="4 images, but --images asks for 9"):
        run_transfer(replace(config, images=(9,)), tmp_path / "other", quiet=True)
