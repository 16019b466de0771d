"""torchvision's models adapted to small images: sizes, shapes, errors, and that they learn."""

import importlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as torchvisions
from trainers import place, prepare
from worlds import ROOT, python, run_all, world_by_hand

import train
from lab import distributed
from lab.config.recipes import resolve
from lab.config.schema import TrainConfig
from lab.data.types import Batch
from lab.distributed import choose_precision
from lab.errors import UserError
from lab.models import (
    MODELS,
    build_model,
    classifier_param_names,
    find_model,
    with_input_defaults,
)
from lab.models.efficientnet_lite import SamePadConv2d

FACTS = {  # parameters; multiply-adds of an image of 32 pixels, forwards; 10 classes, 3 channels
    "googlenet": (9_952_958, 452_175_872),
    "densenet": (769_162, 287_929_692),
    "densenet121": (6_956_426, 888_350_720),
    "mobilenet_v2": (2_236_682, 87_976_448),
    "mobilenet_v3_small": (1_528_106, 17_507_328),
    "efficientnet_b0": (4_020_358, 116_167_168),
    "efficientnet_b1": (6_525_994, 175_290_880),
    "efficientnet_b2": (7_715_084, 204_551_616),
    "efficientnet_b3": (10_711_602, 294_697_280),
    "efficientnet_b4": (17_566_546, 470_642_528),
    "efficientnet_b5": (28_361_274, 747_958_080),
    "efficientnet_b6": (40_758_754, 1_062_872_928),
    "efficientnet_b7": (63_812_570, 1_650_988_032),
    "efficientnet_lite0": (3_383_818, 7_847_648),
    "vit_tiny": (5_362_762, 365_107_584),
    "vit_small": (21_342_346, 1_420_309_248),
    "vit_hybrid": (5_164_642, 353_089_536),
}
LARGE = [f"efficientnet_b{i}" for i in range(1, 8)]  # slow to build, and built like B0


def build(name, num_classes=10, in_chans=3, image_size=32):
    return build_model(name, num_classes=num_classes, in_chans=in_chans, image_size=image_size)


def test_every_model_has_expected_numbers():
    assert {*FACTS, "lenet5", "alexnet"} == set(MODELS)
    page = (ROOT / "docs/architectures.md").read_text()
    for name in FACTS.keys() - {f"efficientnet_b{i}" for i in range(1, 7)}:
        parameters, macs = FACTS[name]
        assert re.search(rf"[|;…] {parameters / 1e6:.1f} M, {macs / 1e6:,.0f} M", page), name


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_macs_are_expected_and_documented(name):
    num_parameters, macs = FACTS[name]
    with torch.device("meta"):
        model = build(name).eval()
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert counter.get_total_flops() == 2 * macs
    module, factory, *_ = MODELS[name].factory.split(":")
    function = getattr(importlib.import_module(f"lab.models.{module}"), factory)
    documented = " ".join(function.__doc__.split())
    assert f" {macs:,} multiply-adds; {num_parameters:,} parameters" in documented


@pytest.mark.parametrize(
    ("name", "in_chans", "image_size"),
    [(n, c, s) for n in FACTS if n not in LARGE for c, s in ((1, 32), (3, 64))],
)
def test_there_is_one_logit_per_class_for_any_image(name, in_chans, image_size):
    with torch.device("meta"):  # shapes only, no arithmetic
        model = build(name, 7, in_chans, image_size).eval()
        for num_images in (0, 2):
            images = torch.empty(num_images, in_chans, image_size, image_size)
            assert model(images).shape == (num_images, 7)


def test_from_64_pixels_on_the_models_are_torchvisions():
    for name in (
        "googlenet",
        "densenet121",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
    ):
        with torch.device("meta"):
            fitted = build(name, image_size=64)
            settings = {"init_weights": True} if name == "googlenet" else {}
            own = torchvisions.get_model(MODELS[name].weights, num_classes=10, **settings)
        assert str(fitted) == str(own).replace("momentum=0.01", "momentum=0.1")


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [

        ("efficientnet_b3", 8, "efficientnet_b3 cannot take images of 8 pixels. Give 16 or more."),
        ("vit_tiny", 30, "vit_tiny cuts images into patches of 4 pixels, but --image-size 30 is "
         "not a multiple of 4. Give --image-size 28 or 32."),

        ("torchvision:vit_b_16", 100, "torchvision:vit_b_16 cannot take images of 100 pixels "
         "(Input shape indivisible by patch size!). Give another --image-size; most were made for "
         "224."),
        ("torchvision:inception_v3", 128, "torchvision:inception_v3 cannot take images of 128 "
         "pixels (*"),
        ("torchvision:resnet19", 32, "torchvision has no classifier resnet19. Did you mean "
         "resnet18 or resnet152 or resnet101?"),
        ("torchvision:", 32, "torchvision has no classifier. Known: alexnet, *"),
    ],
)  # fmt: skip
def test_p7_errors_of_sizes_and_names_have_a_hint(name, image_size, message):
    with pytest.raises(UserError) as caught, torch.device("meta"):
        build(name, image_size=image_size)
    text = str(caught.value)
    assert text.startswith(message[:-1]) if message.endswith("*") else text == message


@pytest.mark.parametrize(
    ("name", "image_size", "heads"),
    [
        ("resnet18", 32, {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", 64, {"classifier.1.weight", "classifier.1.bias"}),
        ("vit_b_32", 64, {"heads.head.weight", "heads.head.bias"}),
        ("swin_t", 32, {"head.weight", "head.bias"}),
    ],
)
def test_any_other_classifier_of_torchvision(name, image_size, heads):
    model = {"num_classes": 7, "in_chans": 1, "image_size": image_size}
    with torch.device("meta"):
        built_model = build(f"torchvision:{name}", **model)
        assert built_model(torch.empty(2, 1, image_size, image_size)).shape == (2, 7)
    assert classifier_param_names(f"torchvision:{name}", **model) == heads
    assert find_model(f"torchvision:{name}").weights == name
    config = with_input_defaults(resolve({"model": f"torchvision:{name}"}))
    assert (config.dataset, config.image_size) == ("cifar10", 224)


def test_p7_a_last_batch_of_one_image_of_one_pixel_is_an_error(fails):
    argv = ["--model", "torchvision:resnet18", "--dataset", "digits", "--image-size", "32"]
    argv += ["--max-train-samples", "9", "--batch-size", "8", "--max-eval-samples", "10"]
    argv += ["--threads", "1", "--quiet"]
    # The warnings are of few steps, missing classes and small classes.
    message = fails(train, *argv, leaves=("runs",), warnings=3)
    assert message.startswith(
        "BatchNorm cannot train on a batch of one image whose feature map has one pixel. "
    )


def test_bfloat16_is_chosen_on_a_cpu_if_it_is_faster(monkeypatch):
    """Depthwise convolutions are slower: EfficientNet-B0's step took 1.5 times as long."""
    monkeypatch.setattr(distributed, "has_native_bf16", lambda _: True)
    for name, precision in {"densenet": "bf16", "efficientnet_b3": "no", "lenet5": "no"}.items():
        spec = MODELS[name]
        chosen = choose_precision("auto", "cpu", spec.benefits_from_bf16, cpu_bf16=spec.cpu_bf16)
        assert chosen == precision
        on_gpu = choose_precision("auto", "cuda", spec.benefits_from_bf16, cpu_bf16=spec.cpu_bf16)
        assert on_gpu == ("bf16" if spec.benefits_from_bf16 else "no")


def test_auxiliary_classifiers_add_to_the_minimized_loss_only():
    """Each with weight 0.3 (Szegedy et al. 2015, section 5); not to the reported metrics."""
    torch.manual_seed(0)
    model = build("googlenet", image_size=16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "optimizer": "sgd"}
    config = TrainConfig(model="googlenet", dataset="digits", **settings)
    train_step = prepare(place("cpu"), model, config)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    outputs = model.train()(images)
    losses = [F.cross_entropy(logits, labels, reduction="sum") for logits in outputs]
    assert len(losses) == 3
    total = (losses[0] + 0.3 * losses[1] + 0.3 * losses[2]) / 6
    gradients = dict(zip(("fc", "aux1.fc2", "aux2.fc2", "conv1.conv"), torch.autograd.grad(
        total, [model.fc.weight, model.aux1.fc2.weight, model.aux2.fc2.weight,
                model.conv1.conv.weight]), strict=True))  # fmt: skip
    before = {name: model.get_submodule(name).weight.detach().clone() for name in gradients}
    totals = train_step.run(Batch(images, labels, torch.arange(6), 6))
    num_correct = (outputs[0].argmax(1) == labels).sum().item()
    assert totals.tolist() == pytest.approx([losses[0].item(), num_correct], rel=1e-4)
    for name, gradient in gradients.items():
        moved = before[name] - model.get_submodule(name).weight.detach()
        torch.testing.assert_close(moved, 0.1 * gradient, rtol=1e-3, atol=1e-6)
    assert isinstance(model.eval()(images), torch.Tensor)


FAMILIES = ("googlenet", "densenet", "mobilenet_v3_small", "efficientnet_b0", "vit_tiny",
            "vit_hybrid")  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_every_parameter(name):
    """In the second step: the head's weights may start with zeros, which stop the gradient."""
    torch.manual_seed(0)
    model = build(name, image_size=16)
    config = TrainConfig(model=name, dataset="digits", optimizer="sgd", lr=0.1)
    train_step = prepare(place("cpu"), model, config)
    train_step.set_training_mode()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        train_step.run(Batch(torch.randn(4, 3, 16, 16), torch.arange(4), None, 4))
    after = dict(model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.slow
def test_two_processes_train_batchnorm_and_a_head_alone(tmp_path):
    """Both end with the same weights, also after a last batch of one sample."""
    command = python("tests/helpers/checks_models.py", tmp_path)
    for ended in run_all([command] * 2, limit=200, envs=world_by_hand(2)):
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 2
    for name in first:
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["num_samples"] == 10


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
