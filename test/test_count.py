"""Multiply-accumulates and the list of models."""

import re

import pytest
import torch
from torch import nn

from waste_seg_ros.cli import main
from waste_seg_ros.models import TRUNKS, build_model, parameter_count
from waste_seg_ros.models.count import count_macs, outline
from waste_seg_ros.runtime.bundle import save_bundle


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small are no work to share; on busy cores threads wait
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # 5 outputs of 3x3x3 at 16x12; the bias costs nothing.
        ([nn.Conv2d(3, 5, 3, padding=1)], 16 * 12 * 5 * 27),
        # Stride 2 halves both sides, 1x1 keeps them.
        ([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 7, 1)], 8 * 6 * (4 * 27 + 7 * 4)),
        # Depthwise: each output sees one channel; dilation changes nothing.
        (
            [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)],
            16 * 12 * (4 * 3 + 4 * 9),
        ),
        # Transposed: each input pixel and channel is spread over 2x2x5.
        ([nn.ConvTranspose2d(3, 5, 2, stride=2)], 16 * 12 * 3 * 5 * 4),
        (
            [nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)],
            16 * 12 * (12 + 4 * 27),
        ),
        # Linear over what pooling left; norms, activations and pooling are not counted.
        (
            [nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)],
            30,
        ),
    ],
)
def test_macs_are_those_counted_by_hand(layers, expected):
    assert count_macs(nn.Sequential(*layers), (16, 12)) == expected


def test_a_layer_counts_each_time_it_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    assert count_macs(Twice(), (16, 12)) == 2 * 16 * 12 * 9


def test_counting_leaves_the_model_as_it_was():
    model = build_model("enet", "instance", width=0.25).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model, (64, 48))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", TRUNKS)
def test_an_outline_counts_like_the_network(name):
    model, bare = build_model(name, "instance", width=0.25), outline(name, "instance", width=0.25)
    assert parameter_count(bare) == parameter_count(model)
    assert count_macs(bare, (64, 64)) == count_macs(model, (64, 64))
    # Twice the area costs twice the layers that run over it: all but what follows a global pooling.
    assert count_macs(bare, (128, 64)) / count_macs(bare, (64, 64)) == pytest.approx(2, rel=0.01)


def test_enet_costs_about_what_its_paper_says():
    """Table 2 of the paper: 0.37 M parameters, and 3.83 GFLOPs at 640x360, two a MAC."""
    model = outline("enet", "semantic", [f"class {k}" for k in range(18)])
    assert parameter_count(model) == pytest.approx(0.37e6, rel=0.05)
    assert 2 * count_macs(model, (640, 360)) == pytest.approx(3.83e9, rel=0.15)


def test_models_lists_bundles_with_their_cost(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = build_model("enet", "semantic", ("paper", "can"), width=0.25)
    saved = save_bundle(tmp_path / "little", model, input_size=(64, 48))
    monkeypatch.setenv("WASTE_SEG_BUNDLES", str(tmp_path))
    assert main(["models"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    row = next(r for r in rows if r.startswith("little")).split()
    assert re.split(r"\s{2,}", head)[-1] == "classes"
    assert row[:5] == ["little", "enet", "0.25", "semantic", "64x48"]
    assert float(row[5]) == pytest.approx(parameter_count(model) / 1e6, abs=6e-4)
    assert float(row[6]) == pytest.approx(count_macs(model, (64, 48)) / 1e9, abs=6e-4)
    assert float(row[7]) == pytest.approx(
        sum(f.stat().st_size for f in saved.path.iterdir()) / 1e6, abs=6e-3
    )
    assert row[8:] == ["f32", "paper,", "can"]


def test_models_tells_a_broken_bundle_and_lists_the_others(colour_bundles, monkeypatch, capsys):
    monkeypatch.setenv("WASTE_SEG_BUNDLES", str(colour_bundles))
    assert main(["models"]) == 1
    captured = capsys.readouterr()
    assert "damaged" in captured.err and "SHA-256" in captured.err
    # Listed without a cost, as its weights are not its architecture's.
    row = next(r for r in captured.out.splitlines() if r.startswith("colours")).split()
    assert row[5:7] == ["-", "-"]
    assert "not the weights of enet" in captured.err


def test_architectures_are_listed_at_full_width(capsys):
    assert main(["models", "--architectures", "--size", "64x64"]) == 0
    out = capsys.readouterr().out
    assert "at 64x64" in out
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(TRUNKS)
    row = next(line for line in out.splitlines() if line.startswith("enet")).split()
    assert float(row[1]) == pytest.approx(parameter_count(outline("enet")) / 1e6, abs=6e-4)


def test_a_size_that_an_architecture_cannot_take_is_told(capsys):
    assert main(["models", "--architectures", "--size", "510x256"]) == 1
    assert "multiples of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["models", "--architectures", "--size", "-8x8"])
