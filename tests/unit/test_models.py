"""LeNet-5 and AlexNet have the published layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.config.recipes import resolve
from lab.errors import UserError
from lab.models import build_model
from lab.models.alexnet import kaiming_init

CLASSIC = ("lenet5", "alexnet")  # the others: test_adapted.py
LENET5 = [
    ("Conv2d", 6, 1, 5, 1, 2),  # out, in, kernel, stride, padding: 28 pixels are padded to 32
    ("Tanh",),
    ("AvgPool2d", 2, 2),
    ("Conv2d", 16, 6, 5, 1, 0),
    ("Tanh",),
    ("AvgPool2d", 2, 2),
    ("Conv2d", 120, 16, 5, 1, 0),
    ("Tanh",),
    ("Flatten",),
    ("Linear", 84, 120),
    ("Tanh",),
    ("Linear", 10, 84),
]
ALEXNET = [
    ("Conv2d", 64, 3, 3, 1, 1),
    ("ReLU",),
    ("MaxPool2d", 2, 2),
    ("Conv2d", 192, 64, 3, 1, 1),
    ("ReLU",),
    ("MaxPool2d", 2, 2),
    ("Conv2d", 384, 192, 3, 1, 1),
    ("ReLU",),
    ("Conv2d", 256, 384, 3, 1, 1),
    ("ReLU",),
    ("Conv2d", 256, 256, 3, 1, 1),
    ("ReLU",),
    ("MaxPool2d", 2, 2),
    ("Flatten",),
    ("Dropout", 0.5),
    ("Linear", 2048, 4096),
    ("ReLU",),
    ("Dropout", 0.5),
    ("Linear", 2048, 2048),
    ("ReLU",),
    ("Linear", 10, 2048),
]


def build(name, num_classes=10, in_chans=3, image_size=32, **settings):
    return build_model(
        name, num_classes=num_classes, in_chans=in_chans, image_size=image_size, **settings
    )


def as_number(number):
    """Return a kernel size, stride or padding as one number."""
    if isinstance(number, tuple):
        assert len(set(number)) == 1
        return number[0]
    return number


def describe(layer):
    name = type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        assert (layer.groups, as_number(layer.dilation), layer.bias is not None) == (1, 1, True)
        window = (layer.kernel_size, layer.stride, layer.padding)
        return (name, layer.out_channels, layer.in_channels, *map(as_number, window))
    if isinstance(layer, (nn.AvgPool2d, nn.MaxPool2d)):
        assert as_number(layer.padding) == 0
        return (name, as_number(layer.kernel_size), as_number(layer.stride))
    if isinstance(layer, nn.Linear):
        assert layer.bias is not None
        return (name, layer.out_features, layer.in_features)
    return (name, layer.p) if isinstance(layer, nn.Dropout) else (name,)


def layers(model):
    """Return the layers in order, without those that do nothing at the default image size."""
    idle = (nn.Identity, nn.AdaptiveAvgPool2d)
    layers_found = [
        m for m in model.modules() if not list(m.children()) and not isinstance(m, idle)
    ]
    return [describe(m) for m in layers_found]


def test_lenet5_has_the_published_layers():
    assert layers(build("lenet5", in_chans=1, image_size=28)) == LENET5
    first = ("Conv2d", 6, 1, 5, 1, 0)
    assert layers(build("lenet5", in_chans=1, image_size=32)) == [first, *LENET5[1:]]


def test_alexnet_has_the_published_layers():
    assert layers(build("alexnet")) == ALEXNET


@pytest.mark.parametrize(("name", "in_chans", "count"), [
    ("lenet5", 1, 61_706),
    ("lenet5", 3, 61_706 + 2 * 6 * 25),
    ("alexnet", 3, 14_859_082),
    ("alexnet", 1, 14_859_082 - 2 * 64 * 9),
])  # fmt: skip
@pytest.mark.parametrize("image_size", [28, 64])
def test_parameter_counts_are_golden(name, in_chans, count, image_size):
    with torch.device("meta"):
        model = build(name, in_chans=in_chans, image_size=image_size)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("image_size", [28, 31, 64])
def test_there_is_one_logit_per_class_for_any_image(name, in_chans, image_size):
    with torch.device("meta"):  # shapes only, no arithmetic
        model = build(name, 7, in_chans, image_size)
        for num_images in (0, 1, 3):
            images = torch.empty(num_images, in_chans, image_size, image_size)
            assert model(images).shape == (num_images, 7)


@pytest.mark.parametrize("init", ["default", "kaiming", "kaiming_zero"])
def test_p2_initial_weights_are_a_function_of_the_seed(init):
    def weights(seed):
        torch.manual_seed(seed)
        return build("lenet5", init=init).state_dict()

    first, second, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = "classifier.2.weight" if init == "kaiming_zero" else ""
    weight_names = {name for name in first if name.endswith("weight")} - {last}
    assert not any(torch.equal(first[name], other[name]) for name in weight_names)


@pytest.mark.parametrize(
    "model", ["lenet5", "alexnet", "densenet", "mobilenet_v3_small", "efficientnet_b0", "vit_tiny"]
)
def test_the_first_loss_on_images_of_ones_own_is_that_of_a_guess(model):
    config = resolve({"dataset": "images/", "model": model})
    torch.manual_seed(0)
    images = torch.randn(36, 3, 32, 32)
    logits = build(model, 9, init=config.init).train()(images)
    loss = F.cross_entropy(logits, torch.arange(36) % 9).item()
    assert loss < 1.2 * math.log(9)


def test_kaiming_keeps_the_variance_through_relus():
    torch.manual_seed(0)
    model = build("alexnet", init="kaiming")
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            expected = (2 / fan_in) ** 0.5
            tolerance = 5 * expected / (2 * layer.weight.numel()) ** 0.5  # five standard errors
            assert layer.weight.std().item() == pytest.approx(expected, abs=tolerance)
            assert not layer.bias.any()


def test_p7_initialization_needs_layers():
    with pytest.raises(UserError, match="--init needs a model with layers"):
        kaiming_init(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), zero_last=True)
