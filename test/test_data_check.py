"""``waste-seg data check``: what it counts, and which pictures it takes for one."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from waste_seg_ros.cli import main
from waste_seg_ros.data.check import NEAR, look_at, matches, perceptual_hash
from waste_seg_ros.data.sources import open_data

SIZE = (120, 90)


def picture(seed, size=SIZE):
    """A blurred pattern of its own for each seed, (H, W, 3) RGB."""
    noise = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), np.uint8)
    return cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)


def write(root, name, image, boxes=((10, 10, 50, 40, 1),)):
    labels = np.zeros(image.shape[:2], np.uint8)
    for x0, y0, x1, y1, label in boxes:
        labels[y0:y1, x0:x1] = label
    for folder, pixels in (("images", image[..., ::-1]), ("masks", labels)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        stem = name.rpartition(".")[0]
        path = root / folder / (name if folder == "images" else f"{stem}.png")
        assert cv2.imwrite(str(path), pixels)


def check(tmp_path, *words):
    path = tmp_path / "findings.json"
    code = main(["data", "check", *words, "--json", str(path)])
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_classes_sizes_and_items(tmp_path, capsys):
    root = tmp_path / "set"
    write(root, "a.png", picture(1), [(10, 10, 50, 40, 1), (60, 10, 70, 20, 2)])
    write(root, "b.png", picture(2), [(0, 0, 120, 90, 1), (0, 0, 10, 10, 254)])
    write(root, "c.png", picture(3, (60, 60)), [(0, 0, 30, 30, 255)])
    code, findings = check(tmp_path, f"folder:{root}")
    assert code == 0 and findings["sound"] is True
    entry = findings["sets"][f"folder:{root}"]
    assert entry["images"] == 3 and entry["sizes"] == {"120x90": 2, "60x60": 1}
    total = 2 * 120 * 90 + 60 * 60 - 30 * 30
    paper = {"pixels": 1200 + 10800 - 100, "items": 2, "images": 2}
    assert entry["classes"]["paper"] == paper | {"share": pytest.approx(11900 / total)}
    assert entry["classes"]["bottle"] | {"share": 0} == {
        "pixels": 100,
        "items": 1,
        "images": 1,
        "share": 0,
    }
    assert entry["classes"]["other"]["items"] == 1 and entry["classes"]["nylon"]["images"] == 0
    assert entry["classes"]["ignore"]["pixels"] == 900
    assert entry["items"]["count"] == 4
    assert (entry["items"]["small"], entry["items"]["medium"], entry["items"]["large"]) == (2, 1, 1)
    assert entry["items"]["area"]["0%"] == 100 and entry["items"]["area"]["100%"] == 10700
    assert entry["empty"] == ["c.png"]
    printed = capsys.readouterr().out
    for part in ("3 images: 2 of 120x90, 1 of 60x60", "without items: c.png", "Nothing is broken"):
        assert part in printed


def test_broken_entries_are_named_with_the_reason(tmp_path, capsys):
    root = tmp_path / "set"
    for name in ("a.png", "b.png", "c.png"):
        write(root, name, picture(ord(name[0])))
    image = root / "images" / "b.png"
    image.write_bytes(image.read_bytes()[:-40])
    write(root, "c.png", picture(5), [(0, 0, 9, 9, 77)])
    code, findings = check(tmp_path, f"folder:{root}")
    assert code == 1 and findings["sound"] is False
    (entry,) = findings["sets"].values()
    assert entry["images"] == 1 and len(entry["broken"]) == 2
    printed = capsys.readouterr().out
    assert "2 broken entries were passed over" in printed and "Nothing is broken" not in printed
    assert "b.png: is cut short" in printed and "c.png: holds the label 77" in printed
    (tmp_path / "findings.json").unlink()
    assert check(tmp_path, f"folder:{root}", "--strict") == (1, {})
    assert "b.png: is cut short" in capsys.readouterr().err


def test_pictures_in_two_splits_are_leaks(tmp_path, capsys):
    train, val = tmp_path / "train", tmp_path / "val"
    for seed in range(4):
        write(train, f"{seed}.png", picture(seed))
    write(val, "same.bmp", picture(1))  # another file, the same pixels
    write(val, "half.png", cv2.resize(picture(2), (60, 45), interpolation=cv2.INTER_AREA))
    write(val, "new.png", picture(9))
    words = ("--split", f"train=folder:{train}", "--split", f"val=folder:{val}")
    code, findings = check(tmp_path, *words)
    assert code == 1
    (leak,) = findings["leaks"]
    assert (leak["one"], leak["other"]) == ("train", "val")
    half, same = leak["pictures"]
    assert same == {"one": "1.png", "other": "same.bmp", "identical": True, "bits": 0}
    assert (half["one"], half["other"], half["identical"]) == ("2.png", "half.png", False)
    assert half["bits"] <= NEAR == findings["near_bits"]
    printed = capsys.readouterr().out
    assert "LEAK: 2 pictures of val are in train too, 1 of them identical" in printed
    assert "same.bmp = 1.png" in printed and "half.png ~ 2.png" in printed
    write(val, "same.png", picture(11))
    for name in ("same.bmp", "half.png"):
        (val / "images" / name).unlink()
    assert check(tmp_path, *words)[0] == 0
    assert "Nothing is broken, nothing leaks." in capsys.readouterr().out


def test_a_picture_twice_in_one_set_is_told_but_is_no_leak(tmp_path, capsys):
    for name, seed in (("a.png", 1), ("b.png", 2), ("c.png", 1)):
        write(tmp_path / "set", name, picture(seed))
    code, findings = check(tmp_path, f"folder:{tmp_path / 'set'}")
    (entry,) = findings["sets"].values()
    assert code == 0 and [(p["one"], p["other"]) for p in entry["twice"]] == [("a.png", "c.png")]
    assert "c.png = a.png" in capsys.readouterr().out


def test_copies_are_near_and_other_pictures_are_not():
    def bits(one, other):
        return int(np.unpackbits(perceptual_hash(one) ^ perceptual_hash(other)).sum())

    for seed in range(5):
        image = picture(seed, (320, 240))
        jpeg = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1)
        half = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
        brighter = np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8)
        for copy in (jpeg, half, brighter):
            assert bits(image, copy) <= NEAR
        assert bits(image, picture(seed + 100, (320, 240))) > 2 * NEAR
        assert bits(image, np.ascontiguousarray(image[:, ::-1])) > 2 * NEAR


def test_scenes_of_one_seed_leak_and_of_two_do_not():
    def split(spec):
        return look_at(spec, spec, open_data(spec, size=(64, 48)))

    one = split("synthetic:1:4")
    assert [m.identical for m in matches(one, split("synthetic:1:3"))] == [True] * 3
    assert matches(one, split("synthetic:2:4")) == []


def test_only_so_many_of_a_set_are_looked_at(tmp_path):
    spec = "synthetic:1:9:64x48"
    assert check(tmp_path, spec, "--count", "2")[1]["sets"][spec]["images"] == 2
    data = open_data("synthetic:1", size=(64, 48))
    assert len(look_at("x", "x", data, 3).names) == 3


def test_categories_without_a_class_are_told(tmp_path, capsys):
    pytest.importorskip("pycocotools", reason="reading COCO files needs pycocotools")
    (tmp_path / "images").mkdir()
    assert cv2.imwrite(str(tmp_path / "images" / "a.png"), picture(1))
    box = [[0, 0, 10, 0, 10, 10, 0, 10]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIZE[0], "height": SIZE[1]}],
        "categories": [{"id": 1, "name": "hat"}, {"id": 2, "name": "Drink can"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": k, "segmentation": box} for k in (1, 2)
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    spec = f"coco:{path}:{tmp_path / 'images'}"
    code, findings = check(tmp_path, spec, "--classes", "can,bottle")
    assert code == 0 and list(findings["sets"][spec]["classes"])[:3] == [
        "background",
        "can",
        "bottle",
    ]
    assert findings["sets"][spec]["unmapped"] == ["hat", "Drink can"]
    assert "of no class (items of unknown kind): hat, Drink can" in capsys.readouterr().out
    assert check(tmp_path, spec, "--categories", "taco")[1]["sets"][spec]["unmapped"] == ["hat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give data to look at"),
        (["--split", "train"], "'train' is not NAME=SPEC"),
        (["--split", "=folder:x"], "is not NAME=SPEC"),
        (["synthetic:1:2", "synthetic:1:2"], "'synthetic:1:2' is given twice"),
        (["folder:nowhere"], "nowhere: has no folder images"),
        (["photos"], "data 'photos' is not understood"),
        (["coco:nowhere.json:x"], "nowhere.json"),
    ],
)
def test_what_cannot_be_looked_at_is_named(tmp_path, capsys, words, message):
    assert main(["data", "check", *words]) == 1
    assert message in capsys.readouterr().err


def test_an_action_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data"])
    assert caught.value.code == 2 and "ACTION" in capsys.readouterr().err
