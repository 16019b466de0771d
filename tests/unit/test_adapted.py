"""torchvision's models adapted to small images: sizes, shapes, errors, and that they learn."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as torchvisions
from trainers import place, prepare
from worlds import run, torchrun

import evaluate
import train
from lab import distributed
from lab.config.recipes import model_defaults
from lab.config.schema import TrainConfig
from lab.data.types import Batch
from lab.distributed import choose_precision
from lab.errors import UserError
from lab.models import MODELS, build_model, classifier_param_names, find_model, small_images

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
    "vit_tiny": (5_362_762, 365_107_584),
    "vit_small": (21_342_346, 1_420_309_248),
    "vit_hybrid": (5_164_642, 353_089_536),
}
LARGE = [f"efficientnet_b{i}" for i in range(1, 8)]  # slow to build, and built like B0


def build(name, num_classes=10, in_chans=3, image_size=32):
    return build_model(name, num_classes=num_classes, in_chans=in_chans, image_size=image_size)


def test_every_model_has_expected_numbers():
    assert {*FACTS, "lenet5", "alexnet", "efficientnet_lite0"} == set(MODELS)


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_macs_are_expected_and_documented(name):
    num_parameters, macs = FACTS[name]
    with torch.device("meta"):
        model = build(name).eval()
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert counter.get_total_flops() == 2 * macs
    _, factory, *_ = MODELS[name].factory.split(":")
    documented = " ".join(getattr(small_images, factory).__doc__.split())
    assert f" {macs:,} multiply-adds; {num_parameters:,} parameters" in documented


@pytest.mark.parametrize(
    ("name", "in_chans", "image_size"),
    [(n, c, s) for n in FACTS if n not in LARGE for c, s in ((1, 28), (3, 64))],
)
def test_there_is_one_logit_per_class_for_any_image(name, in_chans, image_size):
    with torch.device("meta"):  # shapes only, no arithmetic
        model = build(name, 7, in_chans, image_size).eval()
        for num_images in (0, 2):
            images = torch.empty(num_images, in_chans, image_size, image_size)
            assert model(images).shape == (num_images, 7)


@pytest.mark.parametrize("name", [n for n in FACTS if n not in LARGE and "vit" not in n])
def test_small_images_leave_a_map_of_four_pixels_or_more(name):
    """The reason for the changed strides: a map of one pixel would be nothing but padding."""
    sizes = []
    with torch.device("meta"):
        model = build(name).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-1]))
        model(torch.empty(1, 3, 32, 32))
    assert sizes[0] == 32
    assert min(sizes) >= 4


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
        ("mobilenet_v2", 15, "mobilenet_v2 cannot take images of 15 pixels. Give 16 or more."),
        ("efficientnet_b3", 8, "efficientnet_b3 cannot take images of 8 pixels. Give 16 or more."),
        ("vit_tiny", 30, "vit_tiny cuts images into patches of 4 pixels, but --image-size 30 is "
         "not a multiple of 4. Give --image-size 28 or 32."),
        ("vit_hybrid", 100, "vit_hybrid cuts images into patches of 16 pixels, but --image-size "
         "100 is not a multiple of 16. Give --image-size 96 or 112."),
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
    assert model_defaults(f"torchvision:{name}") == ("cifar10", 224)


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


# Half of the way, or less, from the loss of a random guess, ln 10 = 2.30, to the loss measured.
BOUNDS = {
    "googlenet": 1.9,
    "densenet": 1.9,
    "mobilenet_v2": 1.9,
    "mobilenet_v3_small": 1.9,
    "efficientnet_b0": 1.9,
    "vit_tiny": 1.9,
    "vit_hybrid": 1.9,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_a_few_steps_learn_a_few_digits_and_evaluate_repeats_the_report(tmp_path, name):
    """With train.py's default recipe; evaluating the saved weights gives the same report."""
    argv = ["--model", name, "--dataset", "digits", "--threads", "1", "--augment", "none"]
    argv += ["--image-size", "16", "--max-train-samples", "24", "--max-eval-samples", "10"]
    epochs = 30 if name.startswith("vit") else 10  # their learning rate rises more slowly
    argv += [
        "--epochs",
        str(epochs),
        "--batch-size",
        "8",
        "--output-dir",
        str(tmp_path),
        "--name",
        "run",
        "--quiet",
    ]
    train.main([*argv, "--log-every", "1", "--mixed-precision", "no"])
    run = tmp_path / "run"
    losses = [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert len(losses) == 3 * epochs
    assert losses[0] < 2.6  # near ln 10, the loss of a random guess
    print(f"{name}: {losses[0]:.2f} -> {sum(losses[-3:]) / 3:.2f}")
    assert sum(losses[-3:]) / 3 < BOUNDS[name]
    evaluate.main([str(run), "--quiet", "--threads", "1"])
    again, report = (
        json.loads((folder / "report.json").read_text()) for folder in (run / "evaluate-test", run)
    )
    assert report.pop("warnings")  # of the small classes of the training split
    assert again == report


@pytest.mark.slow
def test_two_processes_train_them(tmp_path):
    """Both end with the same weights, also after a last batch of one sample."""
    ended = run(torchrun(2, "tests/helpers/checks_models.py", tmp_path), limit=200)
    assert ended.code == 0, ended.stderr
    assert ended.left_behind == []
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 3
    for name in first:
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["num_samples"] == 10
