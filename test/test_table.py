"""The table of bundles: what is measured, what is kept, and how it is written."""

import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from waste_seg_ros.cli import main
from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.files import write_json
from waste_seg_ros.models import TRUNKS, build_model, parameter_count
from waste_seg_ros.models.count import count_macs
from waste_seg_ros.runtime.bundle import Bundle, BundleError, halve_bundle, open_bundle, save_bundle
from waste_seg_ros.runtime.listing import bundle_cost
from waste_seg_ros.train import table
from waste_seg_ros.train.plots import Series, draw_chart, ticks
from waste_seg_ros.train.table import (
    LIMIT_LOSS,
    LIMIT_MB,
    MARKS,
    TableError,
    build_table,
    choose_bundles,
    data_key,
    find_parent,
    is_compressed,
    markdown,
    measure_sizes,
    measure_times,
    put_into,
    shortcomings,
)

_MADE = table._made_size

DATA = "synthetic:9:2:64x48"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small are no work to share; on busy cores threads wait
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model("enet", "instance", CLASSES, width=0.25).eval()
    folder = tmp_path_factory.mktemp("bundles")
    return save_bundle(folder / "tiny", model, input_size=(64, 48))


@pytest.fixture(scope="module")
def child(bundle):
    path = bundle.path.parent / "tiny-small"
    return halve_bundle(bundle, path, name="tiny-small", parent=bundle.reference)


@pytest.fixture(scope="module", autouse=True)
def _no_bundles_are_made():
    """But where a test asks for it, as that takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_made_size", lambda bundle, stored: 0.25)
        yield


@pytest.fixture(scope="module")
def report(bundle, child):
    return build_table([child, bundle], data=DATA, rounds=2)


def test_a_row_holds_what_the_bundle_is_and_what_was_measured(report, bundle):
    row = report["rows"][1]
    model = build_model("enet", "instance", CLASSES, width=0.25)
    assert (row["name"], row["architecture"], row["width"]) == ("tiny", "enet", 0.25)
    assert row["parameters"] == parameter_count(model)
    assert row["macs"] == count_macs(model, (64, 48))
    files = sum(f.stat().st_size for f in bundle.path.iterdir())
    assert row["mb"] == pytest.approx(files / 1e6, abs=1e-3)
    assert row["mb_by_precision"]["f32"] == pytest.approx(files / 1e6)
    assert row["data"]["frames"] == 2 and 0 <= row["data"]["miou"] <= 1
    assert 0 < row["cpu_ms"] < 1000
    assert {"cpu", "cores", "python", "versions", "commit"} <= set(report["machine"])
    json.dumps(report["machine"])


def test_sizes_come_from_bundles_that_are_there_or_are_made(report, bundle, child):
    small, tiny = report["rows"]
    assert small["mb_by_precision"] == {
        "f32": 0.25,
        "f16": pytest.approx(child.size / 1e6),
        "int8": 0.25,
    }
    assert tiny["mb_by_precision"]["f16"] == pytest.approx(child.size / 1e6)
    assert tiny["mb_by_precision"]["int8"] == 0.25
    assert report["sizes"][bundle.digest] == tiny["mb_by_precision"]
    # What was made before is not made again, and gives way to what is there.
    known = {"f16": 7.0, "int8": 8.0}
    found = measure_sizes(bundle, [bundle, child], known)
    assert found["int8"] == 8.0 and found["f16"] == pytest.approx(child.size / 1e6)
    assert measure_sizes(bundle, [bundle], known)["f16"] == 7.0


def test_bundles_are_made_for_their_size(bundle, child):
    assert _MADE(child, "f32") == pytest.approx(bundle.size / 1e6, rel=0.01)
    assert _MADE(bundle, "f16") == pytest.approx(child.size / 1e6, rel=0.01)
    assert bundle.size / 1e6 > _MADE(bundle, "f16") > _MADE(bundle, "int8") > 0.05
    assert sorted(p.name for p in bundle.path.parent.iterdir()) == ["tiny", "tiny-small"]


def test_integers_cost_what_the_manifest_or_the_parent_tells(bundle, tmp_path):
    (tmp_path / bundle.manifest.name).symlink_to(bundle.path)
    small = Bundle(
        tmp_path / "small",
        replace(bundle.manifest, precision="int8", parent=bundle.reference, training={}),
    )
    assert bundle_cost(small) == bundle_cost(bundle)
    told = replace(small.manifest, training={"parameters": 12, "macs": 345})
    assert bundle_cost(replace(small, manifest=told)) == (12, 345)
    with pytest.raises(BundleError, match="no bundle 'lost'"):
        bundle_cost(replace(small, manifest=replace(small.manifest, parent="lost@" + "0" * 64)))


def test_a_compressed_bundle_is_held_against_its_parent(report):
    small, tiny = report["rows"]
    assert small["parent"] == "tiny" and abs(small["miou_lost"]) < 0.05
    assert tiny["parent"] == "" and math.isnan(tiny["miou_lost"])


def test_the_parent_is_measured_where_only_the_child_is_asked_for(child, monkeypatch):
    monkeypatch.setenv("WASTE_SEG_BUNDLES", str(child.path.parent))
    found = build_table([child], data=DATA, rounds=1)
    assert [row["name"] for row in found["rows"]] == ["tiny-small"]
    assert found["rows"][0]["parent"] == "tiny"
    assert len(found["figures"]) == 2


def test_what_is_known_is_not_measured_again(report, bundle, child, monkeypatch):
    def fail(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(table, "measure_quality", fail)
    known = json.loads(json.dumps(report))
    known["figures"][child.digest][data_key(DATA)]["miou"] = (
        known["figures"][bundle.digest][data_key(DATA)]["miou"] - 0.25
    )
    again = build_table([child, bundle], data=DATA, rounds=1, known=known)
    assert again["rows"][0]["miou_lost"] == pytest.approx(0.25)
    with pytest.raises(AssertionError, match="measured again"):
        build_table([child], data="synthetic:8:1:64x48", rounds=1, known=known)


def test_parents_are_found_by_digest_then_by_name(bundle, child):
    assert find_parent(child, [child, bundle]) is bundle
    assert find_parent(bundle, [child, bundle]) is None
    stale = replace(child, manifest=replace(child.manifest, parent="tiny@" + "0" * 64))
    assert find_parent(stale, [child, bundle]) is bundle
    assert find_parent(child, [child]) is None


def test_only_a_smaller_form_of_the_same_network_counts_as_compressed(bundle, child, monkeypatch):
    assert is_compressed(child, bundle)
    assert not is_compressed(child, None)
    assert not is_compressed(bundle, bundle)  # as one that was trained on is
    other = replace(child, manifest=replace(child.manifest, classes=("jug",)))
    assert not is_compressed(other, bundle)
    pruned = replace(bundle, manifest=replace(bundle.manifest, name="pruned"))
    costs = {"tiny": (100, 1000), "pruned": (60, 600)}
    monkeypatch.setattr(table, "bundle_cost", lambda b: costs[b.manifest.name])
    assert is_compressed(pruned, bundle)


def test_bundles_take_turns(bundle, child, monkeypatch):
    calls = []

    class Fake:
        input_size = (64, 48)

        def __init__(self, name):
            self.name = name

        def predict(self, image):
            assert image.shape == (48, 64, 3)
            calls.append(self.name)

    monkeypatch.setattr(table, "load_backend", lambda b, *a, **k: Fake(b.manifest.name))
    times = measure_times([bundle, child], rounds=2, each=3)
    assert len(times) == 2 and all(t["median_ms"] >= t["min_ms"] > 0 for t in times)
    # A warming round and two, of one prediction that does not count and three each.
    assert calls == (["tiny"] * 4 + ["tiny-small"] * 4) * 3


def test_the_tables_hold_the_figures(report):
    lines = markdown(report).splitlines()
    assert lines[4] == "" and lines[5].startswith(f"On `{DATA}`; CPU ms:") and len(lines) == 6
    head, small = ([c.strip() for c in line.strip("|").split("|")] for line in lines[::2][:2])
    found = dict(zip(head, small, strict=True))
    row = report["rows"][0]
    assert found["bundle"] == "tiny-small" and found["input"] == "64x48"
    assert found["mIoU"] == f"{row['data']['miou']:.3f}"
    assert found["bottle"] == f"{row['data']['iou_bottle']:.3f}"
    assert found["CPU ms"] == f"{row['cpu_ms']:.1f}"
    assert found["mIoU lost to parent"] == f"{row['miou_lost']:+.3f} (tiny)"
    assert found["MB FP32"] == "0.2" and found["MB FP16"] == f"{row['mb']:.1f}"


def with_photographs(report):
    changed = json.loads(json.dumps(report))
    changed["photographs"] = "coco:a.json@0:images"
    for row in changed["rows"]:
        row["photographs"] = {"frames": 7.0, "binary_iou": 0.5, "item_recall": 0.25}
    return changed


def test_photographs_have_a_table_of_their_own(report):
    text = markdown(with_photographs(report))
    first, caption, between, second = text.split("\n\n")
    assert f"{first}\n\n{caption}" == markdown(report)
    assert between.startswith("On 7 real photographs")
    assert second.splitlines()[2].startswith("| tiny-small | 0.500 | 0.250 |")


def test_what_misses_the_limits_is_told(report):
    changed = json.loads(json.dumps(report))
    for row in changed["rows"]:
        row |= {"cpu_ms": 4.0, "cpu_min_ms": 3.0, "miou_lost": 0.002}
    assert shortcomings(changed) == []
    changed["rows"][0] |= {"mb": 10.0, "miou_lost": 0.01, "cpu_ms": 7.0}
    busy, size, loss = shortcomings(changed)
    assert "busy: median times of tiny-small are" in busy
    assert "tiny-small: 10.0 MB" in size
    assert "loses 0.010 of mIoU against tiny" in loss


def test_the_bundles_that_are_shipped_keep_the_limits():
    shipped = [open_bundle(p) for p in sorted((Path(__file__).parents[1] / "bundles").iterdir())]
    assert {b.manifest.architecture for b in shipped} == set(TRUNKS)
    for bundle in shipped:
        assert bundle.size < LIMIT_MB * 1e6, bundle.manifest.name
        assert bundle.manifest.training.get("miou_lost", 0.0) < LIMIT_LOSS, bundle.manifest.name
        if bundle.manifest.precision == "int8":
            assert find_parent(bundle, shipped) is not None, bundle.manifest.name


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# one\n{MARKS[0]}\nold\n{MARKS[1]}\nrest\n")
    put_into(readme, "| new |")
    assert readme.read_text() == f"# one\n{MARKS[0]}\n| new |\n{MARKS[1]}\nrest\n"
    put_into(readme, "| newer |")
    assert readme.read_text() == f"# one\n{MARKS[0]}\n| newer |\n{MARKS[1]}\nrest\n"


@pytest.mark.parametrize(
    "content", ["", MARKS[0], f"{MARKS[1]}\n{MARKS[0]}", f"{MARKS[0]}{MARKS[0]}{MARKS[1]}"]
)
def test_marks_that_are_missing_or_turned_are_told(tmp_path, content):
    readme = tmp_path / "README.md"
    readme.write_text(content)
    with pytest.raises(TableError, match="must each be in it once"):
        put_into(readme, "x")
    assert readme.read_text() == content


def test_data_are_named_without_folders_but_with_what_is_in_them(tmp_path):
    annotations = tmp_path / "annotations.json"
    annotations.write_text("{}")
    key = data_key(f"coco:{annotations}:{tmp_path}/images:{tmp_path}/folds.json:a")
    assert key.startswith("coco:annotations.json@")
    assert key.endswith(":images:folds.json:a") and str(tmp_path) not in key
    annotations.write_text("{ }")
    assert data_key(f"coco:{annotations}:{tmp_path}/images:{tmp_path}/folds.json:a") != key
    assert data_key(DATA) == DATA
    assert data_key("folder:/somewhere/mine") == "folder:mine"


def test_children_follow_their_parents(bundle, child, monkeypatch):
    monkeypatch.setattr(table, "list_bundles", lambda: [child.path, bundle.path])
    assert [b.manifest.name for b in choose_bundles([], ["instance"])] == ["tiny", "tiny-small"]
    with pytest.raises(TableError, match="no bundles with the head binary"):
        choose_bundles([], ["binary"])


def test_the_command_writes_json_plot_and_readme(bundle, child, tmp_path, capsys):
    readme, output, plot = tmp_path / "README.md", tmp_path / "t.json", tmp_path / "t.png"
    readme.write_text("\n".join(MARKS))
    arguments = [
        *("table", str(bundle.path), str(child.path), "--data", DATA, "--rounds", "1"),
        *("--output", str(output), "--plot", str(plot), "--readme", str(readme)),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.strip() in readme.read_text()
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == ["tiny", "tiny-small"]
    assert cv2.imread(str(plot)).std() > 5
    # Once more, from what is known: null in JSON is no number again.
    assert main(arguments) == 0
    assert "on synthetic" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no bundle 'nothing'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["TINY", "--data", "synthetic:1"], "synthetic:1"),
        (["TINY", "--data", "stuff"], "'stuff' is not understood"),
        (["TINY", "--output", "OTHER"], "not of this command"),
    ],
)
def test_what_cannot_be_is_told(bundle, arguments, message, tmp_path, capsys):
    write_json(tmp_path / "other.json", {"rows": 1})
    places = {"TINY": str(bundle.path), "OTHER": str(tmp_path / "other.json")}
    given = [places.get(a, a) for a in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "t.json")]
    assert main(["table", *given]) == 1
    assert message in capsys.readouterr().err


# --- charts ---------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.763, 0.812) == [0.77, 0.78, 0.79, 0.8, 0.81]
    for low, high in ((0.1, 0.11), (3, 977), (-4, 4)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 11 and low <= found[0] and found[-1] <= high


def test_points_are_drawn_where_they_belong():
    blue = np.array((0, 114, 178))
    chart = draw_chart([Series("", [(1.0, 1.0), (3.0, 2.0)])], "t", "x", "y", size=(400, 300))
    ys, xs = np.nonzero((np.abs(chart.astype(int) - blue) < 8).all(2))
    low, high = xs < 200, xs > 300
    assert low.any() and high.any() and (low | high).all()
    assert ys[low].min() > ys[high].max()  # the larger value is higher up


def test_larger_areas_make_larger_discs_and_no_figures_are_told():
    def ink(area):
        series = [Series("", [(1.0, 1.0)], areas=[area]), Series("", [(2.0, 2.0)], areas=[10.0])]
        return int((draw_chart(series, "", "", "") != 255).any(2).sum())

    assert ink(9.0) > ink(1.0) + 300
    with pytest.raises(ValueError, match="no figures"):
        draw_chart([Series("a", [(1.0, math.nan)])], "t", "x", "y")
