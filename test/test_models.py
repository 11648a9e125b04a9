"""Networks: shapes, sizes and the parts that depart from their papers' letter."""

import pytest
import torch

from waste_seg_ros.models import HEADS, TRUNKS, build_model, parameter_count
from waste_seg_ros.models.enet import PReLU, unpool, unpool_mask


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_enet_has_the_papers_size():
    # Table 3 of the paper: 0.37 million parameters.
    assert parameter_count(build_model("enet", "semantic")) == pytest.approx(0.37e6, rel=0.05)


@pytest.mark.parametrize("size", [(240, 320), (176, 320), (64, 64), (72, 104)])
def test_outputs_have_the_contracts_shapes(size):
    height, width = size
    model = build_model("enet", HEADS, ("a", "b", "c")).eval()
    assert height % model.stride == 0
    with torch.inference_mode():
        outputs = model(torch.randn(2, 3, height, width))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "binary": (2, 1, height, width),
        "semantic": (2, 4, height, width),
        "centers": (2, 1, height // 4, width // 4),
        "offsets": (2, 2, height // 4, width // 4),
    }


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ("binary", {"binary"}),
        ("semantic", {"binary", "semantic"}),
        ("instance", {"binary", "semantic", "centers", "offsets"}),
        (("binary", "semantic"), {"binary", "semantic"}),
    ],
)
def test_a_head_gives_its_outputs_only(head, keys):
    with torch.inference_mode():
        outputs = build_model("enet", head).eval()(torch.randn(1, 3, 64, 64))
    assert set(outputs) == keys


def test_weights_of_one_head_are_part_of_those_of_several():
    several = build_model("enet", HEADS).state_dict()
    for head in HEADS:
        one = build_model("enet", head).state_dict()
        assert {k: v.shape for k, v in one.items()}.items() <= {
            k: v.shape for k, v in several.items()
        }.items()


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_width_scales_the_channels(width):
    trunk = TRUNKS["enet"](width)
    assert trunk.channels == {k: int(width * v) for k, v in TRUNKS["enet"]().channels.items()}
    features = trunk.eval()(torch.randn(1, 3, 64, 96))
    for name, scale in (("deep", 8), ("mid", 4), ("fine", 2)):
        shape = (1, trunk.channels[name], 64 // scale, 96 // scale)
        assert tuple(getattr(features, name).shape) == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonet",), "unknown architecture 'nonet'; known: "),
        (("enet", "panoptic"), "unknown head 'panoptic'"),
        (("enet", ()), "unknown head"),
        (("enet", "semantic", ("a", "a")), "distinct"),
        (("enet", "semantic", ()), "at least one"),
        (("enet", "semantic", ("a",), 0.0), "width"),
        (("enet", "semantic", ("a",), float("nan")), "width"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)


def test_unpooling_is_that_by_indices():
    x = torch.randn(2, 5, 8, 12)
    pooled, indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    expected = torch.nn.functional.max_unpool2d(pooled * 3, indices, 2)
    assert torch.equal(unpool(pooled * 3, unpool_mask(x, pooled)), expected)


def test_unpooling_gives_ties_to_every_place():
    x = torch.tensor([[[[1.0, 1.0], [0.0, 1.0]]]])
    assert unpool(
        torch.tensor([[[[5.0]]]]), unpool_mask(x, torch.tensor([[[[1.0]]]]))
    ).tolist() == [[[[5.0, 5.0], [0.0, 5.0]]]]


@pytest.mark.parametrize("channels", [16, 64])
def test_prelu_is_torchs(channels):
    ours, theirs = PReLU(channels).double(), torch.nn.PReLU(channels).double()
    slopes = torch.linspace(-0.5, 1.5, channels, dtype=torch.float64)
    grad = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    results = []
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    for module in (ours, theirs):
        module.weight.data.copy_(slopes)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, module.weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other)


def test_dropout_drops_whole_channels_and_keeps_the_mean():
    from waste_seg_ros.models.enet import _add_dropped

    x, branch = torch.zeros(64, 32, 2, 2), torch.ones(64, 32, 2, 2)
    y = _add_dropped(x, branch, 0.1, training=True)
    per_channel = y.flatten(2)
    assert torch.equal(per_channel.amin(2), per_channel.amax(2))
    assert per_channel.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert float(y.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(_add_dropped(x, branch, 0.1, training=False), branch)
