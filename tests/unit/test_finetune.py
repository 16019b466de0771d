"""Fine-tuning: initial weights, a new head, a frozen backbone."""

import copy
import csv
import json
import math
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mistakes import matches
from resuming import cut_off, same_end, start
from shapes import write_shapes
from sklearn.linear_model import LogisticRegression
from torchvision import models as torchvisions
from trainers import place, prepare

import evaluate
import lab
import train
from lab import console
from lab.checkpoint import init_weights
from lab.checkpoint import weights as weights_module
from lab.config.recipes import resolve, resolve_epochs
from lab.data import DataConfig
from lab.data.loaders import LoaderOptions
from lab.data.splits import load_splits
from lab.data.transforms import BatchTransform
from lab.data.types import Batch
from lab.engine import linear_probe
from lab.engine.linear_probe import (
    PENALTIES,
    fit_classifier,
    fit_logistic_regression,
    select_penalty,
)
from lab.models import IMAGENET_MEAN, IMAGENET_STD, MODELS, build_model, pretrained

NAME = "mobilenet_v3_small"
SMALL = ["--model", NAME, "--image-size", "16", "--recipe", "smoke", "--threads", "1", "--quiet"]
SMALL += [
    "--max-train-samples",
    "24",
    "--max-eval-samples",
    "10",
    "--batch-size",
    "8",
    "--log-every",
    "1",
]
SMALL += ["--max-steps", "0", "--epochs", "2"]


def model_of(name=NAME, num_classes=10, in_chans=3, image_size=16):
    return {
        "name": name, "num_classes": num_classes, "in_chans": in_chans, "image_size": image_size,
    }  # fmt: skip


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """Return torchvision's directory for downloads, empty, without network access."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setenv("TORCH_HOME", str(folder))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return folder / "hub" / "checkpoints"


def imagenets(name, **settings):
    """Return torchvision's model with random weights in place of ImageNet's; all tensors differ."""
    torch.manual_seed(1)
    model = torchvisions.get_model(name, **settings).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def taken(model, source, monkeypatch, found, heads):
    monkeypatch.setattr(pretrained, "fetch", lambda _: dict(found))
    return pretrained.load_pretrained(model, source, heads, {})


def test_p7_pretrained_without_a_network_is_one_line(fails, hub):
    message = fails(train, *SMALL, "--dataset", "digits", "--pretrained")
    assert matches(
        message,
        f"torchvision's ImageNet weights of mobilenet_v3_small cannot be loaded (*). Download "
        f"https://download.pytorch.org/models/mobilenet_v3_small-047dcff4.pth elsewhere and put it "
        f"into {hub}, give other weights with --init-checkpoint, or train from random ones with "
        "--no-pretrained.",
    )


def test_p7_pretrained_is_for_networks_with_such_weights(fails):
    message = fails(train, "--pretrained", "--dataset", "digits")
    assert message.startswith("there are no pretrained weights for lenet5. Known: googlenet, ")
    assert "vit" not in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model mobilenet_v2 --pretrained --init-checkpoint x", "--pretrained and "
         "--init-checkpoint both set the initial weights. Give only one of them."),
        ("--freeze backbone", "--freeze would freeze random weights. Add --pretrained or "
         "--init-checkpoint."),
        ("--linear-probe", "--linear-probe needs pretrained weights. Add --pretrained or "
         "--init-checkpoint."),
        ("--freeze all", "invalid --freeze 'all': expected one of none, backbone, batchnorm."),
    ],
)  # fmt: skip
def test_p7_options_that_do_not_go_together(fails, words, message):
    assert fails(train, *words.split()) == message


def test_the_weights_that_models_name_are_torchvisions():
    for spec in MODELS.values():
        if spec.weights:
            assert torchvisions.get_model_weights(spec.weights).DEFAULT.url.endswith(".pth")


def test_densenets_older_names_find_their_places(hub):
    names = imagenets("densenet121").state_dict()
    hub.mkdir(parents=True)
    url = torchvisions.get_model_weights("densenet121").DEFAULT.url
    older = {
        n.replace("norm1.", "norm.1.").replace("conv1.", "conv.1.").replace("norm2.", "norm.2.")
        .replace("conv2.", "conv.2.") if "denselayer" in n else n: t
        for n, t in names.items()
    }  # fmt: skip
    assert older.keys() != names.keys()
    torch.save(older, hub / Path(url).name)
    assert pretrained.fetch("densenet121").keys() == names.keys()


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_an_unchanged_network_says_what_torchvisions_says(monkeypatch, name):
    """From 64 pixels; grayscale images give the logits of the same images in color."""
    source = imagenets(MODELS[name].weights, num_classes=10)
    images = torch.randn(2, 1, 64, 64)
    for in_chans in (1, 3):
        model = build_model(**model_of(name, 10, in_chans, 64)).eval()
        remarks = taken(model, MODELS[name].weights, monkeypatch, source.state_dict(), set())
        assert len(remarks) == (2 if in_chans == 1 else 1)
        with torch.no_grad():
            expected = source(images.expand(-1, 3, -1, -1))
            found = model(images.expand(-1, in_chans, -1, -1))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_ports_do_to_the_channels_is_in_the_weights(monkeypatch):
    """GoogLeNet's expect another range of values, which torchvision's model converts to."""
    source = imagenets("googlenet", num_classes=10, init_weights=False, transform_input=True)
    model = build_model(**model_of("googlenet", image_size=64)).eval()
    taken(model, "googlenet", monkeypatch, source.state_dict(), set())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images), rtol=1e-3, atol=1e-3)


def test_position_embeddings_are_interpolated_to_the_number_of_patches(monkeypatch):
    source = imagenets("vit_b_32", num_classes=10).state_dict()
    linear = torch.linspace(0, 1, 7).expand(7, 7)  # of the 7x7 patches of 224 pixels
    source["encoder.pos_embedding"][0, 1:] = linear.reshape(49, 1)
    model = build_model(**model_of("torchvision:vit_b_32", image_size=96))
    loaded, adapted = taken(model, "vit_b_32", monkeypatch, source, set())
    assert loaded.startswith("152 of 152 tensors")
    assert adapted == "encoder.pos_embedding [1, 50, 768] adapted to [1, 10, 768]"
    expected = torch.linspace(0, 1, 3).expand(3, 3).reshape(9, 1).expand(9, 768)
    torch.testing.assert_close(model.encoder.pos_embedding[0, 1:], expected)
    token = source["encoder.pos_embedding"][0, 0]
    torch.testing.assert_close(model.encoder.pos_embedding[0, 0], token)


def test_small_images_take_the_middle_of_the_first_kernel(monkeypatch):
    source = imagenets("densenet121")
    model = build_model(**model_of("densenet121", in_chans=1))
    heads = {"classifier.weight", "classifier.bias"}
    remarks = taken(model, "densenet121", monkeypatch, source.state_dict(), heads)
    assert remarks[1:] == [
        "features.conv0.weight [64, 3, 7, 7] adapted to [64, 1, 3, 3]",
        "newly initialized: classifier.weight, classifier.bias",
    ]
    kernel = source.features.conv0.weight[:, :, 2:5, 2:5].sum(1, keepdim=True)
    assert torch.equal(model.features.conv0.weight, kernel)
    assert torch.equal(model.features.norm5.weight, source.features.norm5.weight)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits: ten classes, one channel."""
    folder = tmp_path_factory.mktemp("trained")
    start(folder, *SMALL, "--dataset", "digits")
    return folder / "run"


def start_from(path, **model):
    built_model = build_model(**model_of(**model))
    before = {name: tensor.clone() for name, tensor in built_model.state_dict().items()}
    config = resolve({"model": NAME, "dataset": "digits", "init_checkpoint": str(path)})
    init_weights.load_init_weights(built_model, model_of(**model), config)
    return before, built_model.state_dict()


@pytest.mark.parametrize("num_classes", [10, 3])
def test_init_from_takes_all_but_a_head_of_another_size(trained, monkeypatch, num_classes):
    told = []
    monkeypatch.setattr(init_weights.console, "info", told.append)
    saved = weights_module.read_tensors(trained / "best.safetensors")
    before, after = start_from(trained, in_chans=1, num_classes=num_classes)
    fresh = {name for name in after if not torch.equal(after[name], saved[name])}
    heads = {"classifier.3.weight", "classifier.3.bias"} if num_classes == 3 else set()
    assert fresh == heads
    assert all(torch.equal(after[name], before[name]) for name in heads)
    ending = ", including the classifier"
    if heads:
        ending = "; new classifier: classifier.3.bias, classifier.3.weight"
    assert told == [f"weights of {trained}{ending}"]


def test_p7_init_from_another_network_says_how_it_differs(fails, tmp_path, trained):
    write_shapes(tmp_path / "shapes", 60)
    for words, message in {
        "--model mobilenet_v2": f"holds {NAME}, not mobilenet_v2. Give --model {NAME}.",
        "--dataset shapes": "takes images with 1 channels, but the data have 3. "
        "Give data with that many channels.",
        "--image-size 32": "was trained on images of 16 pixels, not 32. Give --image-size 16.",
    }.items():
        base = [*SMALL, "--dataset", "digits", "--init-checkpoint", trained]
        assert fails(train, *base, *words.split()) == f"{trained}/best.safetensors {message}"
    assert fails(train, *SMALL, "--dataset", "digits", "--init-checkpoint", "gone") == (
        "there is no file gone. Give a run's directory or its best.safetensors."
    )


def test_p7_init_from_weights_that_differ_elsewhere_names_where(fails, tmp_path, trained):
    tensors = weights_module.read_tensors(trained / "best.safetensors")
    metadata = weights_module.read_metadata(trained / "best.safetensors")
    name = "features.12.1.weight"
    for changed in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: torch.zeros(7)},
        tensors | {"features.12.1.new": torch.zeros(7)},
    ):
        weights_module.write_weights(tmp_path / "w", changed, metadata)
        message = fails(train, *SMALL, "--dataset", "digits", "--init-checkpoint", "w")
        assert message.startswith("w holds the weights of another architecture: it differs in ")
        assert message.split("differs in ")[1].startswith("features.12.1.")


def test_a_frozen_backbone_stays_and_its_batchnorm_too(trained):
    words = {"model": NAME, "dataset": "digits", "recipe": "smoke", "init_checkpoint": str(trained)}
    config = resolve({**words, "freeze": "backbone", "ema_decay": 0.5, "max_grad_norm": 1.0})
    model = build_model(**model_of(in_chans=1))
    init_weights.load_init_weights(model, model_of(in_chans=1), config)
    init_weights.freeze(model, model_of(in_chans=1), config.freeze)
    train_step = prepare(place("cpu"), model, config)
    heads = {"classifier.3.weight", "classifier.3.bias"}
    groups = [p for group in train_step.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in groups) == 1024 * 10 + 10
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_step.set_training_mode()
    assert model.training
    for _ in range(2):
        train_step.run(Batch(torch.randn(4, 1, 16, 16), torch.arange(4), None, 4))
    after = model.state_dict()
    assert {n for n in after if not torch.equal(after[n], before[n])} == heads
    assert all(p.grad is None for n, p in model.named_parameters() if n not in heads)


def test_batchnorm_keeps_its_statistics_and_all_parameters_are_trained(trained):
    words = {"model": NAME, "dataset": "digits", "recipe": "smoke", "init_checkpoint": str(trained)}
    config = resolve({**words, "freeze": "batchnorm", "lr": 0.1})
    model = build_model(**model_of(in_chans=1))
    init_weights.freeze(model, model_of(in_chans=1), config.freeze)
    train_step = prepare(place("cpu"), model, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_step.set_training_mode()
    train_step.run(Batch(torch.randn(4, 1, 16, 16), torch.arange(4), None, 4))
    same = {
        name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])
    }
    assert same >= {name for name, _ in model.named_buffers()}
    assert {"features.0.0.weight", "classifier.3.weight"} & same == set()


def test_p3_a_resumed_run_needs_no_file_of_initial_weights():
    config = resolve({"dataset": "digits", "init_checkpoint": "gone"})
    checkpoint = SimpleNamespace(metadata={"normalization": [[0.5], [0.25]]})
    assert init_weights.initial_normalization(config, checkpoint) == ([0.5], [0.25])


# The recipe finetune


@pytest.mark.parametrize(
    ("settings", "model", "recipe"),
    [
        ({"dataset": "photos"}, "torchvision:efficientnet_b0", "finetune"),
        ({"dataset": "photos", "pretrained": False}, "torchvision:efficientnet_b0", "default"),
        ({"dataset": "photos", "model": "torchvision:resnet18"}, "torchvision:resnet18",
         "finetune"),
        ({"dataset": "photos", "model": "alexnet"}, "alexnet", "default"),
        ({"dataset": "photos", "model": "alexnet", "init_checkpoint": "x"}, "alexnet", "finetune"),
        ({"dataset": "photos", "recipe": "notebook"}, "torchvision:efficientnet_b0", "notebook"),
        ({"dataset": "mnist"}, "lenet5", "default"),
    ],
)  # fmt: skip
def test_images_of_ones_own_start_from_pretrained_weights(settings, model, recipe):
    config = resolve(settings)
    assert (config.model, config.recipe) == (model, recipe)
    assert config.pretrained == (recipe == "finetune" and not config.init_checkpoint)
    assert config.monitor == ("accuracy" if settings["dataset"] == "mnist" else "macro_f1") or (
        recipe == "notebook"
    )


@pytest.mark.parametrize(("steps", "epochs"), [(1, 10), (99, 10), (125, 8), (200, 5), (9000, 5)])
def test_few_images_get_more_epochs(steps, epochs):
    config = resolve({"dataset": "photos", "warmup_epochs": 3.0})
    assert resolve_epochs(config, steps) == replace(config, epochs=epochs)
    assert config.warmup_epochs == 3.0  # as given, so that the same command resumes the run
    assert resolve({"model": "vit_tiny", "epochs": 0}).warmup_epochs == 1.0  # the recipe's: 2
    config = resolve({"dataset": "photos", "epochs": 7})
    assert resolve_epochs(config, steps) is config


def test_logistic_regression_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    labels = (features @ torch.randn(7, 3, generator=generator, dtype=torch.float64)).argmax(1)
    weight, bias = fit_logistic_regression(features, labels, 3, penalty=1e-5)
    # scikit-learn minimizes the sum of the losses.
    reference = LogisticRegression(C=1 / (60 * 1e-5), tol=1e-10, max_iter=10**4)
    reference.fit(features, labels)
    expected = torch.tensor(reference.predict_proba(features))
    assert torch.allclose((features @ weight.T + bias).softmax(1), expected, atol=1e-3)


def test_the_classifier_is_fitted_to_the_features_of_evaluation(monkeypatch):
    """Then the model predicts each class as often as it occurs, and nothing else has changed."""
    settings = {"model": NAME, "dataset": "digits", "image_size": 16, "max_train_samples": 100}
    config = resolve({**settings, "recipe": "smoke", "linear_probe": True, "pretrained": True})
    splits = load_splits(DataConfig.of(config), math.inf, 1)
    labels = splits.train.labels
    kept = ((labels < 5) | (torch.arange(len(labels)) % 2 == 0)).nonzero().flatten()
    splits = replace(splits, train=splits.train.select(kept))  # of unequal classes
    torch.manual_seed(0)
    model = build_model(**model_of(in_chans=1))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.fill_(0.1)
    before = copy.deepcopy(model.state_dict())
    options = LoaderOptions(0, 1, torch.device("cpu"), "resident", num_workers=0, memory=math.inf)
    fit_classifier(place("cpu"), model, model.classifier[-1], splits, config, options)
    assert model.training
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"classifier.3.weight", "classifier.3.bias"}
    assert not model.get_submodule("classifier.3")._forward_pre_hooks  # they would keep all inputs
    images = BatchTransform(splits.mean, splits.std, (), "cpu")(splits.train.images)
    with torch.no_grad():
        probabilities = model.eval()(images).softmax(1)
    expected = splits.train.labels.bincount() / len(images)
    assert torch.allclose(probabilities.mean(0), expected, atol=1e-3)
    assert (probabilities.argmax(1) == splits.train.labels).double().mean() > 0.5
    monkeypatch.setattr(linear_probe, "MAX_IMAGES", 60)
    lines = []
    monkeypatch.setattr(console, "info", lines.append)
    fit_classifier(place("cpu"), model, model.classifier[-1], splits, config, options)
    assert "on 60 training images" in lines[-1]


@pytest.mark.parametrize("num_images", [90, 2001])
def test_the_penalty_is_selected_for_all_classes_alike(num_images):
    """Noisy features need a large penalty, features that separate the classes a small one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % 3
    noise = torch.randn(num_images, 40, generator=generator)
    separate = 9 * F.one_hot(labels, 40).float() + noise
    assert select_penalty(noise, labels, 3) == max(PENALTIES)
    assert select_penalty(separate, labels, 3) < max(PENALTIES)
    assert select_penalty(noise[:3], labels[:3], 5) in PENALTIES  # of single images


def test_the_penalty_counts_rare_classes_as_much_as_frequent_ones():
    """A large penalty is best for two classes that are noise, and would sacrifice a third one."""
    features = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100) % 2
    labels[::20] = 2
    features[:, 0] += 4 * (labels == 2)
    assert select_penalty(features, labels, 4) < max(PENALTIES)
    assert select_penalty(features[labels != 2], labels[labels != 2], 4) == max(PENALTIES)


def test_the_average_starts_at_the_fitted_classifier(trained, tmp_path):
    """Otherwise its first step would discard the linear probe and the pretrained features."""
    before = weights_module.read_tensors(trained / "best.safetensors")
    changes = []
    for options in (["--linear-probe"], []):
        argv = [*SMALL, "--dataset", "digits", "--init-checkpoint", str(trained), *options]
        argv += ["--epochs", "1", "--ema-decay", "0.999", "--output-dir", str(tmp_path)]
        after = weights_module.read_tensors(train.main(argv).best)
        name = "features.0.0.weight"
        changes.append((after[name] - before[name]).abs().mean().item())
    assert 0 < 50 * changes[0] < changes[1]


def test_p3_finetuning_your_own_images(hub, tmp_path, monkeypatch, capsys):
    """One run of the recipe: its normalization, its probe, its resumption and its evaluation."""
    source = imagenets("mobilenet_v3_small")
    hub.mkdir(parents=True)
    url = torchvisions.get_model_weights("mobilenet_v3_small").DEFAULT.url
    torch.save(source.state_dict(), hub / Path(url).name)
    words = ["--dataset", str(write_shapes(tmp_path / "shapes", 60)), "--epochs", "2"]
    words += ["--model", "torchvision:mobilenet_v3_small", "--image-size", "40", "--threads", "1"]
    words += ["--batch-size", "16", "--log-every", "1", "--workers", "0"]
    words += ["--augment", "resized-crop,flip,trivialaugment,erasing,cutmix"]
    words += ["--freeze", "batchnorm"]
    whole = start(tmp_path, *words, name="whole").path
    out = " ".join(capsys.readouterr().out.split())
    assert "linear probe: accuracy" in out
    config = json.loads((whole / "config.json").read_text())
    assert (config["recipe"], config["pretrained"], config["crop_pct"]) == ("finetune", True, 0.875)
    metadata = weights_module.read_metadata(whole / "best.safetensors")
    assert metadata["mean"] == list(IMAGENET_MEAN)
    assert metadata["std"] == list(IMAGENET_STD)
    assert metadata["data"]["crop_pct"] == 0.875

    cut_off(monkeypatch, 5, lambda: start(tmp_path, *words, "--checkpoint-every", "2", name="cut"))
    shutil.rmtree(hub)
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "cut")])
    assert "linear probe" not in capsys.readouterr().out
    same_end(tmp_path / "cut", whole)

    evaluate.main([str(whole), "--threads", "1", "--quiet"])
    assert (whole / "evaluate-test/predictions.csv").read_bytes() == (
        whole / "predictions.csv"
    ).read_bytes()
    files = [line.split(",")[-1] for line in (whole / "predictions.csv").read_text().split()[1:]]
    prediction = lab.predict([tmp_path / "shapes" / file for file in files], whole)
    rows = list(csv.DictReader((whole / "predictions.csv").open()))
    assert prediction.names == [row["prediction_name"] for row in rows]
