"""ICNet and BiSeNet: the papers' sizes, the guides, and what was made to export."""

import pytest
import torch
from torch import nn

from waste_seg_ros.models import HEADS, build_model, parameter_count
from waste_seg_ros.models.icnet import BINS, PyramidPooling, pool_and_spread
from waste_seg_ros.models.resnet import ResNet50


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


NINETEEN = [f"class {number}" for number in range(18)]  # and the background


def test_icnet_has_the_papers_size():
    # 26.5 million with ResNet-50 and the 19 classes of Cityscapes.
    model = build_model("icnet", "semantic", NINETEEN)
    assert parameter_count(model) == pytest.approx(26.5e6, rel=0.05)


def test_bisenet_has_the_papers_size():
    # 5.8 MB of 4-byte weights: see the module's docstring.
    model = build_model("bisenet", "semantic", NINETEEN)
    assert 4 * parameter_count(model) == pytest.approx(5.8e6, rel=0.05)


def test_resnet_has_torchvisions_names_and_size():
    # torchvision's resnet50 has 25,557,032 parameters, 2,049,000 of them in the classifier.
    encoder = ResNet50()
    assert parameter_count(encoder) == 25_557_032 - 2_049_000
    state = encoder.state_dict()
    for name, shape in (
        ("conv1.weight", (64, 3, 7, 7)),
        ("bn1.running_mean", (64,)),
        ("layer1.0.downsample.0.weight", (256, 64, 1, 1)),
        ("layer2.3.conv2.weight", (128, 128, 3, 3)),
        ("layer3.5.bn3.bias", (1024,)),
        ("layer4.2.conv3.weight", (2048, 512, 1, 1)),
    ):
        assert tuple(state[name].shape) == shape


@pytest.mark.parametrize("name", ["icnet", "bisenet"])
@pytest.mark.parametrize("size", [(96, 128), (192, 256), (64, 64), (32, 96)])
def test_outputs_have_the_contracts_shapes(name, size):
    height, width = size
    model = build_model(name, HEADS, ("a", "b", "c"), 0.25).eval()
    with torch.inference_mode():
        outputs = model(torch.randn(2, 3, height, width))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "binary": (2, 1, height, width),
        "semantic": (2, 4, height, width),
        "centers": (2, 1, height // 4, width // 4),
        "offsets": (2, 2, height // 4, width // 4),
    }


@pytest.mark.parametrize(("name", "strides"), [("icnet", (16, 8)), ("bisenet", (16, 8))])
def test_guides_are_for_training_only(name, strides):
    guided = build_model(name, "instance", ("a", "b"), 0.25, guides=True)
    outputs = guided(torch.randn(2, 3, 64, 96))
    for number, stride in enumerate(strides):
        assert tuple(outputs[f"guide{number}"].shape) == (2, 3, 64 // stride, 96 // stride)
    with torch.inference_mode():
        assert not any(key.startswith("guide") for key in guided.eval()(torch.randn(1, 3, 64, 96)))
    plain = build_model(name, "instance", ("a", "b"), 0.25)
    assert set(plain.state_dict()) < set(guided.state_dict())
    assert not any(key.startswith("guide") for key in plain(torch.randn(2, 3, 64, 96)))


@pytest.mark.parametrize("name", ["icnet", "bisenet"])
def test_gradients_reach_every_weight(name):
    model = build_model(name, HEADS, ("a", "b"), 0.25, guides=True)
    outputs = model(torch.randn(2, 3, 64, 64))
    torch.stack([value.square().mean() for value in outputs.values()]).sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size", [3, 6, 7, 16])
@pytest.mark.parametrize("bins", BINS)
def test_pooling_by_a_matrix_is_adaptive_pooling(size, bins):
    line = torch.randn(2, 1, size)
    pooled = nn.functional.adaptive_avg_pool1d(line, bins)
    expected = nn.functional.interpolate(pooled, size=size, mode="linear", align_corners=False)
    found = line @ pool_and_spread(size, bins, line).t()
    torch.testing.assert_close(found, expected)


def test_the_pyramid_pools_both_ways():
    x = torch.randn(1, 2, 6, 9)
    expected = x.clone()
    for bins in BINS:
        expected += nn.functional.interpolate(
            nn.functional.adaptive_avg_pool2d(x, bins), size=(6, 9), mode="bilinear"
        )
    torch.testing.assert_close(PyramidPooling()(x), expected)
