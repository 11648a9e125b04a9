"""The synthetic line: determinism, exact truth, and that every class can be drawn."""

import cv2
import numpy as np
import pytest

from waste_seg_ros.cli import main
from waste_seg_ros.data.sample import CLASSES, IGNORE
from waste_seg_ros.data.sprites import render_sprite, sprite_classes
from waste_seg_ros.data.synthetic import SyntheticLine, synthetic_sample


def test_every_default_class_can_be_rendered():
    assert sprite_classes() == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_sprite_is_one_piece_that_stops_light_where_it_covers(name):
    for seed in range(8):
        sprite = render_sprite(name, np.random.default_rng(seed))
        covered = sprite.reflect[..., 3] > 127
        assert sprite.kind.startswith(name + "/")
        assert covered.sum() > 300
        assert (sprite.transmit[sprite.reflect[..., 3] == 0] == 255).all()
        assert (sprite.reflect[..., :3][sprite.reflect[..., 3] == 0] == 0).all()
        assert sprite.transmit[covered].mean() < 235


def test_unknown_class_is_refused_by_name():
    with pytest.raises(KeyError, match=r"glass.*paper"):
        render_sprite("glass", np.random.default_rng(0))


def test_equal_seed_and_index_give_equal_samples_in_any_order():
    first = synthetic_sample(11, 5)
    for index in (900, 3):
        synthetic_sample(11, index)
    again = synthetic_sample(11, 5)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.instances, again.instances)
    assert not np.array_equal(first.image, synthetic_sample(12, 5).image)
    assert not np.array_equal(first.image, synthetic_sample(11, 6).image)


@pytest.mark.parametrize("size", [(320, 240), (320, 180), (96, 128)])
def test_sample_is_consistent(size):
    seen = set()
    for index in range(12):
        s = synthetic_sample(2, index, size)
        assert s.image.shape == (size[1], size[0], 3) and s.image.dtype == np.uint8
        assert s.labels.shape == s.instances.shape == (size[1], size[0])
        assert set(np.unique(s.labels)) <= {0, 1, 2, 3, 4, IGNORE}
        known = (s.labels > 0) & (s.labels != IGNORE)
        assert np.array_equal(s.instances > 0, known)
        for k in np.unique(s.instances[s.instances > 0]):
            labels = np.unique(s.labels[s.instances == k])
            assert len(labels) == 1
            seen.add(int(labels[0]))
    assert seen == {1, 2, 3, 4}


def test_line_moves_by_its_speed_and_keeps_ids():
    line = SyntheticLine(seed=7, size=(320, 240), speed=0.3)
    before, after = line.frame(2.0), line.frame(2.1)
    shift = 0.3 * 0.1 / line.meters_per_pixel
    whole = {i.id: i for i in after.items if i.visible > 0.97 and not i.truncated}
    pairs = [(i, whole[i.id]) for i in before.items if i.id in whole and i.visible > 0.97]
    assert len(pairs) >= 3
    for a, b in pairs:
        assert a.class_index == b.class_index
        assert b.center[0] - a.center[0] == pytest.approx(shift, abs=0.75)
        assert b.center[1] - a.center[1] == pytest.approx(0, abs=0.75)
        assert a.velocity == pytest.approx((0.3 / line.meters_per_pixel, 0))


def test_line_frames_do_not_depend_on_what_was_asked_before():
    line = SyntheticLine(seed=1, size=(160, 120))
    first = line.frame(0.5)
    for k in range(80):
        line.frame(float(k))
    again = line.frame(0.5)
    assert np.array_equal(first.sample.image, again.sample.image)
    assert first.items == again.items


def test_line_truth_matches_its_pictures():
    line = SyntheticLine(seed=3, size=(320, 240))
    frame = line.frame(4.0)
    assert len(frame.items) >= 2
    assert {i.instance for i in frame.items} == set(np.unique(frame.sample.instances)) - {0}
    for item in frame.items:
        ys, xs = np.nonzero(frame.sample.instances == item.instance)
        assert item.center == pytest.approx((xs.mean(), ys.mean()))
        assert (frame.sample.labels[ys, xs] == item.class_index).all()
        edge = xs.min() == 0 or ys.min() == 0 or xs.max() == 319 or ys.max() == 239
        assert item.truncated == edge


def test_empty_belt():
    frame = SyntheticLine(seed=0, size=(160, 120), density=0).frame(1.0)
    assert frame.items == () and not frame.sample.labels.any()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": (8, 8)}, "size"),
        ({"view": 0.0}, "view"),
        ({"density": -1.0}, "density"),
        ({"speed": float("nan")}, "speed"),
    ],
)
def test_line_names_the_argument_out_of_range(arguments, word):
    with pytest.raises(ValueError, match=word):
        SyntheticLine(**arguments)


def test_the_contact_sheet_is_drawn(tmp_path, capsys):
    output = tmp_path / "sheet.png"
    words = ["contact-sheet", "--size", "64x48", "--columns", "2", "--output", str(output)]
    assert main([*words, "--count", "3", "--labels"]) == 0
    assert cv2.imread(str(output)).shape == (96, 128, 3)
    assert main([*words, "--count", "0"]) == 1
    assert "--count and --columns must be at least 1" in capsys.readouterr().err
