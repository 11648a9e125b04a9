"""U-Net and SegNet on VGG-16 and ResNet-50: sizes, unpooling, ImageNet weights, export."""

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from waste_seg_ros.models import TRUNKS, build_model, parameter_count
from waste_seg_ros.models.enet import unpool, unpool_mask
from waste_seg_ros.models.pretrained import load_encoder
from waste_seg_ros.models.resnet import ResNet50
from waste_seg_ros.models.vgg import VGG16
from waste_seg_ros.runtime import export
from waste_seg_ros.runtime.bundle import load_model, save_bundle

NAMES = ("unet-vgg16", "unet-resnet50", "segnet-vgg16", "segnet-resnet50")
FINE = {"unet-vgg16": 1, "unet-resnet50": 2, "segnet-vgg16": 1, "segnet-resnet50": 2}
SMALL = 0.125

# torchvision's documented parameters of vgg16_bn and resnet50, less their linear layers.
VGG16_PARAMETERS = 138_365_992 - sum(
    inputs * outputs + outputs for inputs, outputs in ((25088, 4096), (4096, 4096), (4096, 1000))
)
RESNET50_PARAMETERS = 25_557_032 - (2048 * 1000 + 1000)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small are no work to share; on busy cores threads wait
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def without_memory(name, width=1.0):
    with torch.device("meta"):
        return TRUNKS[name](width)


def settled(module, image=None):
    """``module`` in eval mode with the batch statistics of an image, not those it began with."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        module.train()(torch.randn(4, 3, 64, 96) if image is None else image)
    return module.eval()


def conv(inputs, outputs, kernel=3):
    """Parameters of a convolution without bias and its batch normalisation."""
    return kernel * kernel * inputs * outputs + 2 * outputs


def up(inputs, outputs):
    """Parameters of a 2x2 transposed convolution."""
    return 4 * inputs * outputs + outputs


def test_segnet_has_the_papers_size():
    # 29.45 million in the paper's table on run time.
    assert parameter_count(without_memory("segnet-vgg16")) == pytest.approx(29.4e6, rel=0.05)


@pytest.mark.parametrize(
    ("name", "encoder", "deepest", "skips"),
    [
        ("unet-vgg16", VGG16_PARAMETERS, 512, (512, 256, 128, 64)),
        ("unet-resnet50", RESNET50_PARAMETERS, 2048, (1024, 512, 256, 64)),
    ],
)
def test_unet_has_the_layers_of_its_layout(name, encoder, deepest, skips):
    expected, inputs = encoder, deepest
    for skip, outputs in zip(skips, (512, 256, 128, 64), strict=True):
        expected += up(inputs, outputs) + conv(outputs + skip, outputs) + conv(outputs, outputs)
        inputs = outputs
    assert parameter_count(without_memory(name)) == expected


def test_segnet_on_resnet_has_the_layers_of_its_layout():
    expected = RESNET50_PARAMETERS + conv(2048, 1024, kernel=1)
    for inputs, outputs in ((1024, 512), (512, 256), (256, 64), (64, 64)):
        expected += conv(inputs, outputs) + conv(outputs, outputs)
    assert parameter_count(without_memory("segnet-resnet50")) == expected


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (64, 160)])
@pytest.mark.parametrize("name", NAMES)
def test_features_have_their_strides(name, size):
    trunk = TRUNKS[name](SMALL).eval()
    assert (trunk.stride, trunk.fine_stride) == (32, FINE[name])
    with torch.inference_mode():
        features = trunk(torch.randn(2, 3, *size))
    for key, stride in (("deep", 8), ("mid", 4), ("fine", FINE[name])):
        shape = (2, trunk.channels[key], size[0] // stride, size[1] // stride)
        assert tuple(getattr(features, key).shape) == shape


@pytest.mark.parametrize("name", NAMES)
def test_width_scales_the_channels(name):
    full, half = without_memory(name), without_memory(name, 0.5)
    assert half.channels == {k: v // 2 for k, v in full.channels.items()}
    assert half.encoder.channels == tuple(c // 2 for c in full.encoder.channels)
    # Convolutions, most of the weights, shrink with the square.
    assert parameter_count(half) == pytest.approx(parameter_count(full) / 4, rel=0.01)
    odd = without_memory(name, 0.3)
    assert all(m.out_channels % 8 == 0 for m in odd.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    trunk = settled(TRUNKS[name](SMALL))
    features = trunk(torch.randn(2, 3, 64, 96))
    maps = (features.deep, features.mid, features.fine)
    torch.stack([(f * torch.randn_like(f)).mean() for f in maps]).sum().backward()
    still = [n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


# --------------------------------------------------------------------------------------------------
# Encoders and their weights


def test_encoders_have_torchvisions_names_and_shapes():
    with torch.device("meta"):
        vgg, resnet = VGG16().state_dict(), ResNet50().state_dict()
    # 13 convolutions with bias, 53 without; 5 tensors for each batch normalisation.
    assert (len(vgg), len(resnet)) == (13 * 7, 53 * 6)
    for name, shape in {
        "features.0.weight": (64, 3, 3, 3),
        "features.1.running_mean": (64,),
        "features.7.weight": (128, 64, 3, 3),
        "features.24.weight": (512, 256, 3, 3),
        "features.40.weight": (512, 512, 3, 3),
        "features.40.bias": (512,),
        "features.41.num_batches_tracked": (),
    }.items():
        assert tuple(vgg[name].shape) == shape
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.bias": (1024,),
        "layer4.0.downsample.1.weight": (2048,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
    }.items():
        assert tuple(resnet[name].shape) == shape


def test_vgg_computes_what_its_layers_say():
    encoder = settled(VGG16(SMALL))
    x = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        stages = encoder(x)
        for stage, pooling in zip(stages, (6, 13, 23, 33, 43), strict=True):
            before = encoder.features[:pooling](x)
            torch.testing.assert_close(functional.relu(stage.before), before)
            pooled = functional.max_pool2d(before, 2)
            torch.testing.assert_close(functional.relu(stage.pooled), pooled)


@pytest.fixture(scope="module")
def imagenet():
    """State dicts as torchvision has them, of whatever numbers, by the encoder's class."""
    generator = torch.Generator().manual_seed(1)

    def numbers(module, classifier):
        shapes = {k: (tuple(v.shape), v.dtype) for k, v in module.state_dict().items()}
        shapes |= {k: (v, torch.float32) for k, v in classifier.items()}
        return {k: torch.rand(v, generator=generator).to(t) for k, (v, t) in shapes.items()}

    with torch.device("meta"):
        vgg, resnet = VGG16(), ResNet50()
    return {
        VGG16: numbers(vgg, {"classifier.6.weight": (1000, 8), "classifier.6.bias": (1000,)}),
        ResNet50: numbers(resnet, {"fc.weight": (1000, 8), "fc.bias": (1000,)}),
    }


@pytest.mark.parametrize("kind", [VGG16, ResNet50])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_load_by_name_without_the_classifier(imagenet, kind, suffix, tmp_path):
    weights = imagenet[kind]
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":  # as old as those files are: without the counters
        kept = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        torch.save(kept, path)
    else:
        save_file(weights, path)
    encoder = kind()
    assert str(path) in load_encoder(nn.Sequential(encoder), path)
    own = encoder.state_dict()
    names = [k for k in own if not k.endswith("num_batches_tracked")]
    assert all(torch.equal(own[name], weights[name]) for name in names)


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("features.3.weight"), "lacks features.3.weight"),
        (lambda w: w.update({"features.99.weight": torch.zeros(1)}), "features.99.weight besides"),
        (lambda w: w["features.1.bias"].fill_(float("nan")), "features.1.bias holds"),
        (lambda w: w.update({"features.0.weight": "text"}), "not a state dict"),
        (lambda w: w.update({"features.0.weight": _Harmful()}), "can run code"),
        (lambda w: w.clear(), "not a state dict"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(spoil, message, tmp_path):
    encoder = VGG16(SMALL)
    weights = {k: v.clone() for k, v in encoder.state_dict().items()}
    before = {k: v.clone() for k, v in weights.items()}
    weights["features.0.bias"] += 1
    spoil(weights)
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(encoder, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_weights_of_another_network_or_width_are_refused(imagenet, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(imagenet[VGG16], path)
    with pytest.raises(ValueError, match=r"\(64, 3, 3, 3\), not \(16, 3, 3, 3\); .* width 1"):
        load_encoder(VGG16(0.25), path)
    with pytest.raises(ValueError, match="does not fit ResNet50: it lacks bn1.bias, .* more"):
        load_encoder(ResNet50(SMALL), path)


def test_a_network_without_such_an_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no VGG-16 or ResNet-50"):
        load_encoder(TRUNKS["enet"](), tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "text.pth", "text.safetensors"])
def test_a_file_that_is_no_weights_is_named(name, tmp_path):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("These are no weights.")
    with pytest.raises(ValueError, match=name):
        load_encoder(VGG16(SMALL), path)


# --------------------------------------------------------------------------------------------------
# Unpooling


def test_unpooling_by_mask_is_unpooling_by_indices():
    x, values = torch.randn(2, 5, 12, 16), torch.randn(2, 5, 6, 8)
    pooled, indices = functional.max_pool2d(x, 2, return_indices=True)
    expected = nn.MaxUnpool2d(2)(values, indices)
    assert torch.equal(unpool(values, unpool_mask(x, pooled)), expected)


def test_segnet_is_the_papers_with_pooling_indices():
    trunk = settled(TRUNKS["segnet-vgg16"](SMALL))
    x = torch.randn(1, 3, 64, 96)
    poolings, start, y = [], 0, x
    decoded = []
    with torch.inference_mode():
        for pooling in (6, 13, 23, 33, 43):
            # All but the stage's last ReLU; the indices of the maxima before it.
            y = trunk.encoder.features[start : pooling - 1](y)
            y, indices = functional.max_pool2d(y, 2, return_indices=True)
            y, start = functional.relu(y), pooling + 1
            poolings.append(indices)
        for convs, indices in zip(trunk.decoder, reversed(poolings), strict=True):
            y = convs(nn.MaxUnpool2d(2)(y, indices))
            decoded.append(y)
        features = trunk(x)
    torch.testing.assert_close(features.fine, decoded[-1])
    torch.testing.assert_close(features.deep, decoded[1])
    assert features.fine.std() > 0.1


def test_segnet_on_resnet_unpools_where_the_encoder_had_its_maxima():
    trunk = settled(TRUNKS["segnet-resnet50"](SMALL))
    entered = []
    for convs in trunk.decoder:
        convs.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        trunk(x)
        maps = trunk.encoder(x)[-2::-1]
    for unpooled, before in zip(entered, maps, strict=True):
        highest = functional.interpolate(functional.max_pool2d(before, 2), scale_factor=2.0)
        assert unpooled.any()
        assert not unpooled[before < highest].any()


# --------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_graph_gives_the_networks_labels(name, tmp_path):
    # Writing the bundle compares at two sizes; here it is read back and met at a third.
    frame = export.test_frame((160, 96))[None]
    seen = torch.from_numpy(frame).permute(0, 3, 1, 2) / 64.0 - 2.0  # about as frames normalised
    model = settled(build_model(name, "instance", ("a", "b", "c"), SMALL), seen)
    bundle = save_bundle(tmp_path / name, model, head="instance", input_size=(64, 64))
    session = onnxruntime.InferenceSession(
        str(bundle.path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"image": frame})
    with torch.inference_mode():
        expected = export.deploy(load_model(bundle), bundle.manifest)(torch.from_numpy(frame))
    assert found[0].shape == (1, 96, 160)
    assert len(np.unique(found[0])) > 1
    for one, other in zip(found, expected, strict=True):
        # All but a few: where two values of a window are equal but for rounding, which of them is
        # the maximum is each runtime's own.
        assert np.isclose(one, other.numpy(), rtol=1e-2, atol=1e-2).mean() > 0.995
