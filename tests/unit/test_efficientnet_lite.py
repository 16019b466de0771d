"""EfficientNet-Lite0: its layers, its padding, and the names of its ImageNet weights."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from worlds import ROOT

from lab.errors import UserError
from lab.models import build_model
from lab.models.efficientnet_lite import SamePadConv2d, efficientnet_lite0


def build(num_classes=10, in_chans=3, image_size=32):
    model = {"num_classes": num_classes, "in_chans": in_chans, "image_size": image_size}
    return build_model("efficientnet_lite0", **model)


@pytest.mark.parametrize(
    ("num_classes", "image_size", "macs", "num_parameters"),
    [(10, 32, 7_847_648, 3_383_818), (1000, 224, 385_187_552, 4_652_008)],
)
def test_parameters_and_macs_are_expected_and_documented(
    num_classes, image_size, macs, num_parameters
):
    with torch.device("meta"):
        model = build(num_classes, 3, image_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, image_size, image_size))
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert counter.get_total_flops() == 2 * macs
    documented = " ".join(efficientnet_lite0.__doc__.split())
    assert f"{macs:,} multiply-adds; {num_parameters:,} parameters" in documented


def test_layers_are_those_of_the_weights():
    with torch.device("meta"):
        modules = list(build().modules())
    assert not any(isinstance(m, nn.SiLU) for m in modules)
    assert {m.eps for m in modules if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert sum(isinstance(m, SamePadConv2d) for m in modules) == 5  # all with stride 2
    assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in modules) == 5


@pytest.mark.parametrize(("in_chans", "image_size"), [(1, 32), (3, 33), (1, 224)])
def test_there_is_one_logit_per_class_for_any_image(in_chans, image_size):
    with torch.device("meta"):
        model = build(7, in_chans, image_size).eval()
        assert model(torch.empty(2, in_chans, image_size, image_size)).shape == (2, 7)


def test_p7_images_that_are_too_small_are_an_error():
    with pytest.raises(UserError, match="efficientnet_lite0 cannot take images of 31 pixels"):
        build(image_size=31)


@pytest.mark.parametrize(
    ("kernel", "size", "padding"),  # left and top, right and bottom
    [(3, 8, (0, 1)), (3, 7, (1, 1)), (5, 8, (1, 2)), (5, 7, (2, 2))],
)
def test_padding_is_tensorflows(kernel, size, padding):
    conv = SamePadConv2d(1, 1, kernel, stride=2, bias=False)
    images = torch.randn(2, 1, size, size)
    expected = F.conv2d(F.pad(images, padding * 2), conv.weight, stride=2)
    torch.testing.assert_close(conv(images), expected)
    assert expected.shape[-1] == (size + 1) // 2


def test_every_tensor_of_the_package_has_a_place(monkeypatch):
    """A state dict with the package's names, in the order in which its model applies them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pretrained = importlib.import_module("pretrained")
    with torch.device("meta"):
        expected = build(1000, 3, 224).state_dict()
    modules = ["_conv_stem", "_bn0"]
    for block in range(16):
        layers = ["_expand_conv", "_bn0"] if block else []
        layers += ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        modules += [f"_blocks.{block}.{layer}" for layer in layers]
    modules += ["_conv_head", "_bn1", "_fc"]
    parts = {"conv": ["weight"], "fc": ["weight", "bias"]}
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    source = {
        f"{module}.{part}": tensor
        for (module, part), tensor in zip(
            [
                (module, part)
                for module in modules
                for part in parts.get("conv" if "conv" in module else module.strip("_"), bn)
            ],
            expected.values(),
            strict=True,
        )
    }
    assert len(source) == 296
    converted = pretrained.convert(source)
    assert list(converted) == list(expected)
    assert len(set(pretrained.CLASS_NAMES)) == 1000
