"""Grad-CAM: the layer, the heat maps, the overlays and their place in the page."""

import json
import re

import numpy as np
import pytest
import torch
from handmade import make_run, predicted, splits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.errors import UserError
from lab.models import build_model
from lab.report import explain, html, mistakes

METADATA = {
    "model": {"name": "tiny", "num_classes": 2, "in_chans": 1, "image_size": 8},
    "mean": [0.0],
    "std": [1.0],
}


@pytest.fixture
def tiny():
    """Return a model whose logits are minus and plus the mean of the bright pixels."""
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False),
    )  # fmt: skip
    model[0].weight.data.fill_(1)
    model[-1].weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
    return model


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("lenet5", 32, "features.4"),
        ("alexnet", 32, "features.11"),
        ("googlenet", 32, "inception5b"),
        ("torchvision:resnet18", 64, "layer4"),
        ("torchvision:squeezenet1_1", 64, "classifier.2"),
        ("vit_tiny", 32, None),
        ("vit_hybrid", 32, None),
    ],
)
def test_the_layer_is_the_last_map_before_pooling(name, size, layer):
    with torch.device("meta"):
        model = build_model(name, num_classes=3, in_chans=3, image_size=size).eval()
        found = explain.find_layer(model, torch.empty(1, 3, size, size))
    names = {module: name for name, module in model.named_modules()}
    assert (found and names[found]) == layer
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_a_heat_map_is_the_formula_of_the_paper_and_leaves_no_gradients(tiny):
    images = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)  # more than one batch
    images[:, :, 4:, 6:] = 200
    images[:, :, 0, 0] = 100
    # The gradient is the same at every pixel: the map is the image if it raises the logit.
    heatmaps = explain.GradCam(tiny.train(), METADATA)(images, torch.tensor([1] * 8 + [0]))
    expected = (255 * images[0, 0].double() / 200).round().byte()
    assert torch.equal(heatmaps[:8], expected.expand(8, -1, -1))
    assert not heatmaps[8].any()
    assert not tiny.training
    assert all(p.grad is None and not p.requires_grad for p in tiny.parameters())


def test_overlays_keep_the_directories_of_images_and_replace_nothing(tmp_path, tiny):
    out = tmp_path / "out"
    paths = [str(tmp_path / "in" / name) for name in ("a/1.png", "b/1.png", "b/1.jpg")]
    writer = explain.OverlayWriter(str(out), paths, tiny, METADATA)
    writer([2, 0, 1], torch.zeros(3, 1, 8, 8).byte(), torch.ones(3).long())
    files = [out / name for name in ("a/1.png.png", "b/1.jpg.png", "b/1.png.png")]
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == files
    for file in files:
        with Image.open(file) as picture:
            assert (picture.size, picture.mode) == ((224, 224), "RGB")
    for directory in (out, files[0]):
        with pytest.raises(
            UserError, match=r"it is not an empty directory. Give a new or an empty one"
        ):
            explain.overlay_files(str(directory), paths)


def test_p7_without_captum_or_a_feature_map(tiny, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UserError, match="tiny has no convolutional feature map"):
        explain.GradCam(model, METADATA)
    monkeypatch.setattr(explain, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--explain needs captum. Run pip install -e '.\[explain"):
        explain.GradCam(tiny, METADATA)


def embedded(path):
    text = path.read_text()
    [data] = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data)["mistakes"]


def test_the_page_shows_heat_maps_and_probabilities_beside_mistakes(tmp_path, tiny):
    path, data = make_run(tmp_path / "run", "abcd", num_test=500), splits("abcd", 500)
    text, shown = embedded(html.write(path))
    assert "pip install -e" in text
    assert all(overlay == "" for *_, overlay in shown)

    tiny[0] = nn.Conv2d(3, 1, 1)
    architecture = METADATA["model"] | {"in_chans": 3, "image_size": 16}
    metadata = {"model": architecture, "mean": [0.0] * 3, "std": [1.0] * 3}
    predictions, config = predicted(data.test), recipes.resolve({"dataset": "digits"})
    predictions.predictions.clamp_(max=1)  # the tiny model has two classes
    mistakes.save_images(RunDir(path), config, data, predictions, explain.GradCam(tiny, metadata))
    tensors = load_file(path / "images.safetensors")
    assert tensors["heatmaps"].shape == (36, 16, 16)
    probabilities = torch.rand(500, 4)
    save_file({"probabilities": probabilities}, path / "predictions.safetensors")
    text, shown = embedded(html.write(path))
    assert "pip install -e" not in text
    assert [bool(overlay) for *_, overlay in shown] == [k < 36 for k in range(len(shown))]
    for index, (*_, top, _) in zip(tensors["mistakes_index"].tolist(), shown, strict=True):
        values, classes = probabilities[index].topk(3)
        assert [k for k, _ in top] == classes.tolist()
        assert [p for _, p in top] == pytest.approx(values.tolist(), abs=1e-4)

    save_file(tensors | {"heatmaps": torch.zeros(2, 3)}, path / "images.safetensors")
    with pytest.raises(UserError, match=r"images\.safetensors .heatmaps is not"):
        html.write(path)


def test_an_overlay_is_colored_as_strongly_as_the_heat_map():
    image = np.random.default_rng(0).integers(256, size=(3, 8, 8), dtype=np.uint8)
    assert np.array_equal(explain.overlay(image, np.zeros((4, 4), np.uint8)), image)
    colored = explain.overlay(image, np.full((4, 4), 255, np.uint8)).astype(float)
    color = (colored - (1 - explain.MAX_OPACITY) * image) / explain.MAX_OPACITY
    assert np.ptp(color, axis=(1, 2)).max() < 2  # one color, but for rounding
