"""The benchmark: its arithmetic and its report, and that tiny runs of all parts end.

Nothing here depends on how fast the machine is.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from waste_seg_ros.bench import WORSE, graph, model, peer
from waste_seg_ros.bench.compare import Figure, compare, figures, judge, read_report
from waste_seg_ros.bench.figures import BenchError, overhead, standard_error, thinned, timing
from waste_seg_ros.bench.report import charts
from waste_seg_ros.cli import main
from waste_seg_ros.data.synthetic import synthetic_crowd
from waste_seg_ros.perception.items import ItemParams

# --- arithmetic -----------------------------------------------------------------------------------


def test_timing_sums_up_all_runs_and_tells_the_noise_of_the_rounds():
    rounds = [np.array([0.001, 0.002, 0.003]), np.array([0.002, 0.004, 0.006])]
    found = timing(rounds)
    assert found.count == 6
    assert found.p50 == pytest.approx(2.5)
    assert found.least == pytest.approx(1.0)
    assert found.p90 == pytest.approx(np.percentile([1, 2, 2, 3, 4, 6], 90))
    # Medians 2 and 4 ms: a median absolute deviation of 1 ms.
    assert found.error == pytest.approx(1.2533 * 1.4826 / math.sqrt(2))
    assert math.isnan(timing(rounds[:1]).error)
    with pytest.raises(ValueError, match="nothing"):
        timing([])


def test_standard_error_of_normal_values_is_that_of_their_median_and_minds_no_hiccup():
    rng = np.random.default_rng(0)
    values = rng.normal(10, 2, 4000)
    medians = [np.median(rng.normal(10, 2, 400)) for _ in range(400)]
    assert standard_error(values[:400]) == pytest.approx(np.std(medians), rel=0.25)
    values[0] = 1e6
    assert standard_error(values) < 0.06


def test_overhead_compares_within_each_round():
    # The machine was ten times slower in the second round, for both.
    own = [np.array([1.1, 1.1]), np.array([11.0, 11.0]), np.array([1.2, 1.2])]
    limit = [np.array([1.0, 1.0]), np.array([10.0, 10.0]), np.array([1.0, 1.0])]
    share, error = overhead(own, limit)
    assert share == pytest.approx(10.0)
    assert error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "count, parts, lengths", [(10, 4, [2, 3, 3, 2]), (2, 8, [1, 1]), (0, 3, [0])]
)
def test_thinned_parts_are_consecutive_and_even(count, parts, lengths):
    cut = thinned(list(range(count)), parts)
    assert [value for part in cut for value in part] == list(range(count))
    assert [len(part) for part in cut] == lengths


def test_all_take_turns_in_every_round_and_warm_up_first():
    calls = []
    clock = iter(range(10_000))
    runners = [(lambda x: calls.append(("a", x)), [1, 2]), (lambda x: calls.append(("b", x)), [3])]
    found = model.take_turns(runners, rounds=4, repeats=3, clock=lambda: next(clock), warm_up=2)
    assert [[len(times) for times in rounds] for rounds in found] == [[3] * 4, [3] * 4]
    assert all((times == 1).all() for rounds in found for times in rounds)  # ticks of the clock
    assert calls[:4] == [("a", 1), ("b", 3)] * 2
    for number in range(4):  # one run that is not timed and three that are, each in one piece
        names = [name for name, _ in calls[4 + 8 * number : 12 + 8 * number]]
        assert names in (["a"] * 4 + ["b"] * 4, ["b"] * 4 + ["a"] * 4)
    assert {given for name, given in calls if name == "a"} == {1, 2}


# --- comparing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after, verdict",
    [
        (Figure(10, 0.01, "ms"), Figure(10.4, 0.01, "ms"), "same"),  # below the tolerance
        (Figure(10, 0.01, "ms"), Figure(11, 0.01, "ms"), "worse"),
        (Figure(10, 0.01, "ms"), Figure(9, 0.01, "ms"), "better"),
        (Figure(10, 0.3, "ms"), Figure(11, 0.4, "ms"), "same"),  # within three times 0.5
        (Figure(10, 0.3, "ms"), Figure(11.6, 0.4, "ms"), "worse"),
        (Figure(0.10, 0.001, "ms"), Figure(0.14, 0.001, "ms"), "same"),  # too little to matter
        (Figure(30, 0.1, "/s", True), Figure(25, 0.1, "/s", True), "worse"),
        (Figure(25, 0.1, "/s", True), Figure(30, 0.1, "/s", True), "better"),
        (Figure(250, math.nan, "MB"), Figure(300, math.nan, "MB"), "worse"),
        (Figure(0.0, math.nan, "share"), Figure(0.01, math.nan, "share"), "same"),
        (Figure(0.0, math.nan, "share"), Figure(0.05, math.nan, "share"), "worse"),
    ],
)
def test_worse_is_beyond_tolerance_noise_and_what_matters(before, after, verdict):
    assert judge(before, after) == verdict


def entry_of_graph(**changes):
    entry = {
        "node": "segmenter",
        "backend": "openvino",
        "image": [640, 480],
        "input": [320, 240],
        "rate": 30.0,
        "items": 10,
        "overload": False,
        "found": 10.0,
        "frames_per_second": {"value": 30.0, "error": 0.1},
        "latency_ms": {"p50": 20.0, "p90": 30.0, "p99": 40.0, "error": 0.2, "error_p99": 1.0},
        "not_served_share": 0.0,
        "age_p99_in_inferences": 1.5,
        "cpu_percent": {"segmenter": 50.0, "camera": 10.0, "bench": 5.0},
        "memory_mb": {"peak": 260.0, "growth": 0.0},
    }
    return {**entry, **changes}


@pytest.fixture
def report():
    ms = {"p50": 6.0, "p90": 7.0, "p99": 9.0, "least": 5.5, "error": 0.01, "error_p99": 0.2}
    ms["count"] = 100
    return {
        "kind": "waste-seg bench",
        "format": 1,
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "clock": "wall",
        "machine": {"processor": "a processor", "cores": 2, "busy_before": 0.0},
        "settings": {"model": "net@0"},
        "model": [{"name": "openvino", "kind": "backend", "size": [320, 240], "ms": ms}],
        "node": [
            {
                "node": "segmenter",
                "backend": "openvino",
                "image": [640, 480],
                "items": count,
                "found": count,
                "input": [320, 240],
                "total_ms": ms,
                "stages_ms": {"conversion": ms, "inference": ms},
            }
            for count in (1, 10)
        ],
        "graph": [entry_of_graph(), entry_of_graph(rate=60.0), entry_of_graph(items=50)],
    }


def write(folder, name, report):
    path = folder / name
    path.write_text(json.dumps(report))
    return str(path)


def test_compare_tells_by_its_exit_code(report, tmp_path, capsys):
    slower = copy.deepcopy(report)
    slower["graph"][0]["latency_ms"]["p99"] = 60.0
    del slower["graph"][2]  # not measured there: no regression
    faster = copy.deepcopy(report)
    faster["model"][0]["ms"]["p50"] = 4.0
    files = [write(tmp_path, f"{k}.json", r) for k, r in enumerate((report, slower, faster))]
    assert main(["bench", "compare", files[0], files[0]]) == 0
    assert main(["bench", "compare", files[0], files[1]]) == WORSE
    printed = capsys.readouterr().out
    assert "worse  graph segmenter openvino 640x480 to 320x240, 30 Hz, 10 items: latency p99" in (
        printed
    )
    assert "(+50.0 %)" in printed
    assert main(["bench", "compare", files[1], files[0]]) == 0
    assert main(["bench", "compare", files[0], files[2]]) == 0
    assert "better model openvino 320x240 p50: 6 -> 4 ms (-33.3 %)" in capsys.readouterr().out
    assert main(["bench", "compare", files[0], files[1], "--tolerance", "60"]) == 0


def test_what_cannot_be_compared_is_refused(report, tmp_path, capsys):
    other = copy.deepcopy(report)
    other["machine"]["cores"] = 4
    with pytest.raises(BenchError, match="cores 2 and 4"):
        compare(report, other)
    assert compare(report, other, any_machine=True)
    with pytest.raises(BenchError, match="processor time"):
        compare(report, {**report, "clock": "processor"})
    with pytest.raises(BenchError, match="no figure in common"):
        compare(report, {**report, "model": [], "node": [], "graph": []})
    bad = tmp_path / "bad.json"
    for text, problem in (("{", "not JSON"), ("[]", "not a report"), ("{}", "not a report")):
        bad.write_text(text)
        with pytest.raises(BenchError, match=problem):
            read_report(bad)
    bad.write_text(json.dumps({**report, "format": 99}))
    assert main(["bench", "compare", str(bad), str(bad)]) == 1
    assert "bad.json: is of format 99" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "none.json"), str(bad)]) == 1


def test_a_report_with_unknown_errors_is_read(report):
    # JSON has no NaN: write_json makes it null.
    report["model"][0]["ms"]["error"] = None
    report["graph"][0]["latency_ms"]["error_p99"] = None
    assert math.isnan(figures(report)["model openvino 320x240 p50"].error)
    assert all(one.verdict == "same" for one in compare(report, report))


def test_charts_are_of_one_width_and_drawn_of_what_there_is(report):
    drawn = charts(report)
    # The network, stages over items, latency over items and over rates, images over rates.
    assert len(drawn) == 5
    assert len({image.shape for image in drawn}) == 1
    assert charts({**report, "model": [], "node": [], "graph": []}) == []


# --- the peer -------------------------------------------------------------------------------------


def raw_of(boxes, classes=2, size=(64, 64)):
    """A network's output of such boxes (x, y, w, h, class, score); masks fill them wholly."""
    out = np.zeros((4 + classes + 32, len(boxes)), np.float32)
    for k, (x, y, w, h, kind, score) in enumerate(boxes):
        out[:4, k] = x, y, w, h
        out[4 + kind, k] = score
        out[-32, k] = 1.0
    masks = np.zeros((32, size[1] // 4, size[0] // 4), np.float32)
    masks[0] = 1.0
    return peer.Raw(out, masks)


def test_peer_thins_out_boxes_of_one_class_and_fills_their_masks():
    raw = raw_of(
        [
            (16, 16, 16, 16, 0, 0.9),
            (17, 16, 16, 16, 0, 0.8),  # the same again
            (48, 48, 16, 8, 1, 0.7),
            (32, 8, 8, 8, 1, 0.1),  # too unlikely
        ]
    )
    instances, labels, scores = peer.decode(raw, (64, 64))
    assert set(np.unique(instances)) == {0, 1, 2}
    first, second = labels == 1, labels == 2
    assert first[2:6, 2:6].all() and first.sum() == 16
    assert second[11:13, 10:14].all() and second.sum() == 8
    assert scores[3, 3] == np.float32(0.9) and scores[11, 11] == np.float32(0.7)
    found, items = peer.peer_items(raw, (128, 128), ItemParams(min_pick_area_px=1), (64, 64))
    assert found.shape == (16, 16)
    assert sorted((item.class_index, item.roi) for item in items) == [
        (1, (16, 16, 32, 32)),
        (2, (80, 88, 32, 16)),
    ]


def test_peer_of_random_weights_takes_the_best_boxes():
    raw = raw_of([(16, 16, 8, 8, 0, 2e-4), (48, 48, 8, 8, 1, 1e-4), (48, 16, 8, 8, 1, 1e-5)])
    assert not peer.decode(raw, (64, 64))[0].any()
    assert len(np.unique(peer.decode(raw, (64, 64), best=2)[0])) == 3
    assert not peer.decode(raw, (64, 64), best=2)[0][:8, 8:].any()


def test_boxes_off_the_picture_do_not_wrap_around():
    raw = raw_of([(0, 0, 16, 16, 0, 0.9), (64, 64, 16, 16, 1, 0.8), (200, 20, 8, 8, 1, 0.7)])
    instances, labels, _ = peer.decode(raw, (64, 64))
    assert labels[:2, :2].all() and labels[14:, 14:].all()
    assert np.count_nonzero(instances) == 8


def test_peer_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match="pip install ultralytics"):
        peer.build_peer("yolo11n-seg", 4, (64, 64), tmp_path / "x.onnx")
    assert peer.peer_size((320, 240)) == (320, 256)


@pytest.fixture(scope="session")
def peer_graph(tmp_path_factory):
    """A graph with the inputs and outputs of the peer's, 64x64, one box in the middle."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    raw = raw_of([(32, 32, 32, 32, 1, 0.9)], classes=4)
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["all_boxes", "nothing"], ["boxes"]),
        helper.make_node("Add", ["all_masks", "nothing"], ["masks"]),
    ]
    constants = {
        "zero": np.float32(0),
        "all_boxes": raw.boxes[None],
        "all_masks": raw.masks[None],
    }
    given = helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 64, 64, 3])
    shapes = {"boxes": raw.boxes[None].shape, "masks": raw.masks[None].shape}
    outputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()]
    initial = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    network = helper.make_graph(nodes, "peer", [given], outputs, initial)
    made = helper.make_model(network, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    path = tmp_path_factory.mktemp("peer") / "middle.onnx"
    onnx.save(made, str(path))
    return path


def test_peer_network_runs_on_both_runtimes(peer_graph, tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    for runtime in model.RAW:
        network = peer.PeerNetwork(peer_graph, runtime, threads=1)
        assert network.input_size == (64, 64)
        instances, labels, _ = peer.decode(network.predict(image), (64, 64))
        assert (labels[4:12, 4:12] == 2).all() and np.count_nonzero(instances) == 64
        with pytest.raises(ValueError, match="the peer takes"):
            network.predict(image[:32])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(BenchError, match="broken.onnx"):
        peer.PeerNetwork(broken, "onnxruntime")


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_a_crowd_has_just_so_many_items_that_lie_apart(count):
    sample = synthetic_crowd(3, count, (640, 480))
    assert len(np.unique(sample.instances)) == count + 1
    # Background and one piece, or some, of each; none runs into its neighbour.
    _, pieces = cv2.connectedComponents((sample.instances > 0).view(np.uint8))
    assert len(np.unique(np.stack([pieces, sample.instances]).reshape(2, -1), axis=1)[0]) == (
        pieces.max() + 1
    )
    again = synthetic_crowd(3, count, (640, 480))
    assert np.array_equal(sample.image, again.image)


def test_a_crowd_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit into 32x32"):
        synthetic_crowd(0, 200, (32, 32))


# --- runs -----------------------------------------------------------------------------------------


def test_model_writes_its_figures(colour_bundles, peer_graph, tmp_path, capsys):
    output = tmp_path / "bench.json"
    arguments = ["--model", str(colour_bundles / "colours"), "--backends", "openvino,onnxruntime"]
    arguments += ["--rounds", "3", "--repeats", "2", "--threads", "1", "--peer", str(peer_graph)]
    assert main(["bench", "model", *arguments, "--output", str(output)]) == 0
    report = read_report(output)
    names = [entry["name"] for entry in report["model"]]
    ours = ["openvino", "raw openvino", "onnxruntime", "raw onnxruntime"]
    assert names == [*ours, "middle openvino", "middle onnxruntime"]
    for entry in report["model"]:
        ms = entry["ms"]
        assert 0 < ms["least"] <= ms["p50"] <= ms["p90"] <= ms["p99"]
        assert ms["count"] == 6
        assert ("over_raw_percent" in entry) == (entry["kind"] == "backend")
    assert report["settings"]["model"].startswith("colours@")
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "speed only" in printed
    assert output.with_suffix(".png").is_file()
    assert main(["bench", "compare", str(output), str(output), "--all"]) == 0


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["model", "--model", "nowhere"], "nowhere"),
        (["model", "--backends", "abacus"], "--backends: unknown abacus"),
        (["model", "--peer", "none.onnx"], "--peer: there is no file none.onnx"),
        (["model", "--output", "here.txt"], "must end in .json"),
        (["node", "--output", "no/folder/x.json"], "there is no folder"),
    ],
)
def test_bad_command_lines_are_refused_before_anything_is_measured(
    arguments, problem, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    assert problem in capsys.readouterr().err


def test_node_measures_each_stage(colour_bundles, peer_graph, tmp_path):
    pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file)")
    output = tmp_path / "bench.json"
    arguments = ["--model", str(colour_bundles / "colours"), "--backend", "onnxruntime"]
    arguments += ["--rounds", "3", "--repeats", "2", "--threads", "1", "--peer", str(peer_graph)]
    arguments += ["--images", "160x120", "--items", "1", "4", "--output", str(output)]
    assert main(["bench", "node", *arguments]) == 0
    entries = read_report(output)["node"]
    assert [(e["node"], e["items"]) for e in entries] == [
        ("segmenter", 1),
        ("segmenter", 4),
        ("middle", 1),
    ]
    for entry in entries:
        stages = entry["stages_ms"]
        assert list(stages) == ["conversion", "inference", "extraction", "filling", "serialisation"]
        assert all(stage["count"] == 6 and stage["p50"] > 0 for stage in stages.values())
        assert max(stage["least"] for stage in stages.values()) < entry["total_ms"]["p99"]
        assert entry["overhead_percent"]["value"] > 0 and entry["raw_ms"]["p50"] > 0
    assert entries[2]["found"] == 1.0  # the one box of the stand-in


def test_growth_is_from_the_second_fifth_to_the_last():
    assert graph.growth([999.0, 0.0, 100.0, 100.0, 1.0, 1.0, 1.0, 1.0, 130.0, 130.0]) == 30.0
    assert graph.growth([1.0, 2.0]) == 0.0


def test_a_window_is_summed_up():
    heard = graph.Heard(
        arrivals=[0.1 * k for k in range(41)],
        latencies=[0.02] * 40 + [0.5],
        published=[0.015] * 41,
        inference=[0.01] * 41,
        items=[3, 5] * 20 + [4],
    )
    counts = {"published": 50, "received": 48, "served": 41, "dropped": 7}
    found = graph.sum_up(heard, counts, lasted=4.0)
    assert found["frames_per_second"]["value"] == pytest.approx(10.0)
    assert found["camera_per_second"] == 12.5
    assert found["latency_ms"]["p50"] == pytest.approx(20.0)
    assert found["latency_ms"]["p99"] > 20.0
    assert found["found"] == 4.0 and found["lost"] == 2 and found["dropped"] == 7
    assert found["not_served_share"] == pytest.approx(9 / 50)
    assert found["age_p99_in_inferences"] == pytest.approx(1.5)
    with pytest.raises(BenchError, match="no items"):
        graph.sum_up(graph.Heard(), counts, 4.0)


def run_graph(folder, *arguments):
    """In a process of its own, which rclpy is started in."""
    command = [sys.executable, "-m", "waste_seg_ros.cli", "bench", "graph", *map(str, arguments)]
    command += ["--images", "160x120", "--items", "4", "--warm-up", "1", "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=240)


def test_graph_runs_segmenter_and_peer(colour_bundles, peer_graph, tmp_path):
    pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file)")
    done = run_graph(
        tmp_path,
        *("--model", colour_bundles / "colours", "--backend", "onnxruntime", "--seconds", 1.5),
        *("--rates", 10, "--overload", 0, "--peer", peer_graph, "--output", "graph.json"),
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "graph.json")
    entries = report["graph"]
    assert [(e["node"], e["rate"], e["overload"]) for e in entries] == [
        ("segmenter", 10.0, False),
        ("middle", 10.0, False),
    ]
    for entry in entries:
        latency = entry["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert 2 <= latency["count"] <= entry["served"] <= entry["published"]
        assert entry["served"] + entry["dropped"] + entry["lost"] == entry["published"]
        assert entry["memory_mb"]["peak"] > 20
        assert entry["cpu_percent"]["segmenter"] > 0
    assert entries[0]["input"] == [160, 120] and entries[1]["found"] == 1.0
    assert "over DDS" in done.stdout and figures(report)
    assert not list(Path(tmp_path).glob("*.npy"))


def test_graph_that_does_not_start_says_why(tmp_path, colour_bundles):
    pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file)")
    done = run_graph(
        tmp_path, "--model", colour_bundles / "colours", "--backend", "torch", "--peer", "none"
    )
    assert done.returncode == 1
    assert "160x120 at 30 Hz, 4 items" in done.stderr
    assert "torch" in done.stderr
