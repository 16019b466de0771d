"""`--model timm:NAME`: families of models through all scripts, and timm's weights."""

import json

import huggingface_hub
import pytest
import safetensors.torch
import torch
from worlds import run_world

import evaluate
import export
import lab
import train
from lab.config.recipes import resolve
from lab.engine.optimizer import layer_scales
from lab.errors import UserError
from lab.models import (
    build_model,
    classifier_param_names,
    external,
    find_model,
    with_input_defaults,
)

timm = pytest.importorskip("timm")

FAMILIES = {  # name: image size in pixels
    "resnet18": 32,
    "vit_tiny_patch16_224": 32,
    "convnext_atto": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "mobilenetv4_conv_small": 32,
}
SMALL = ["--dataset", "digits", "--recipe", "smoke", "--max-train-samples", "64", "--batch-size"]
SMALL += ["16", "--max-eval-samples", "20", "--epochs", "2", "--threads", "1", "--quiet"]


def model_of(name, image_size=32, num_classes=10, in_chans=1):
    return {
        "name": f"timm:{name}", "num_classes": num_classes, "in_chans": in_chans,
        "image_size": image_size,
    }  # fmt: skip


EXPORTED = ("vit_tiny_patch16_224",)  # the others take longer
IN_A_WORLD = ("resnet18", "vit_tiny_patch16_224")


def words_of(name, output):
    words = [*SMALL, "--model", f"timm:{name}", "--image-size", str(FAMILIES[name])]
    return [*words, "--output-dir", str(output), "--name", name]


@pytest.mark.parametrize(
    "name", [n if n.startswith("vit_tiny_p") else pytest.param(n, marks=pytest.mark.slow)
             for n in FAMILIES]
)  # fmt: skip
def test_family_is_trained_resumed_evaluated_and_exported(name, tmp_path):
    run = train.main([*words_of(name, tmp_path), "--max-steps", "2"])
    train.main(["--resume", str(run.path), "--max-steps", "4", "--quiet"])
    evaluate.main([str(run.path), "--quiet", "--output", str(tmp_path / "evaluated")])
    reports = [json.loads((path / "report.json").read_text())
               for path in (run.path, tmp_path / "evaluated")]  # fmt: skip
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    images = torch.randint(256, (2, 1, 40, 50), dtype=torch.uint8)
    assert lab.predict(images, run.path).probabilities.shape == (2, 10)
    if name in EXPORTED:
        output = tmp_path / "model.pt2"
        export.main([str(run.path), "--format", "torch-export", "--output", str(output)])


@pytest.mark.slow
def test_families_are_trained_on_two_processes(tmp_path):
    script = tmp_path / "train_all.py"
    commands = [" ".join([*words_of(name, tmp_path), "--max-steps", "2"]) for name in IN_A_WORLD]
    script.write_text(f"import train\nfor words in {commands!r}:\n    train.main(words.split())\n")
    ended = run_world(2, script, limit=400)
    assert [e.code for e in ended] == [0, 0], ended[0].stderr
    for name in IN_A_WORLD:
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert sum(map(sum, report["confusion_matrix"])) == report["num_samples"] == 20


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    whole = train.main([*words_of("vit_tiny_patch16_224", tmp_path / "whole"), "--max-steps", "4"])
    cut = train.main([*words_of("vit_tiny_patch16_224", tmp_path / "cut"), "--max-steps", "2"])
    train.main(["--resume", str(cut.path), "--max-steps", "4", "--quiet"])
    tensors = [safetensors.torch.load_file(run.best) for run in (whole, cut)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Publish random weights of 1,000 classes in place of timm's; return the names of the files."""
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        torch.manual_seed(1)
        model = timm.create_model(repository.removeprefix("timm/").partition(".")[0])
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_p4_weights_are_safetensors_and_all_but_the_head_is_loaded(published, tmp_path):
    argv = [*SMALL, "--model", "timm:resnet18", "--image-size", "32", "--pretrained"]
    argv += ["--freeze", "backbone", "--epochs", "1", "--max-steps", "1"]
    run = train.main([*argv, "--output-dir", str(tmp_path)])
    assert published == [("timm/resnet18.a1_in1k", "model.safetensors")]
    trained, source = (safetensors.torch.load_file(path)
                       for path in (run.best, tmp_path / "model.safetensors"))  # fmt: skip
    assert torch.equal(trained["layer4.1.conv2.weight"], source["layer4.1.conv2.weight"])
    gray = source["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(trained["conv1.weight"], gray)
    assert trained["fc.weight"].shape == (10, 512)
    metadata = lab.load_model(run.path, "cpu")[1]
    assert metadata["versions"]["timm"] == timm.__version__


def test_images_are_prepared_as_for_the_weights(published, tmp_path):
    """timm's list of weights says size, crop, filter, mean and standard deviation."""
    words = {"dataset": str(tmp_path), "model": "timm:vit_tiny_patch16_224"}
    config = with_input_defaults(resolve(words))
    assert (config.recipe, config.pretrained) == ("finetune", True)
    assert (config.image_size, config.crop_pct, config.interpolation) == (224, 0.9, "bicubic")
    from lab.checkpoint.init_weights import initial_normalization

    assert initial_normalization(config, None) == ((0.5,) * 3, (0.5,) * 3)
    given = {**words, "image_size": 96, "crop_pct": 1.0, "interpolation": "bilinear"}
    config = with_input_defaults(resolve(given))
    assert (config.image_size, config.crop_pct, config.interpolation) == (96, 1.0, "bilinear")


def test_published_crops_are_at_most_the_whole_image(tmp_path):
    words = {"dataset": str(tmp_path), "model": "timm:volo_d5_512"}  # 1.15
    assert with_input_defaults(resolve(words)).crop_pct == 1


def test_torchvisions_weights_say_how_images_are_prepared(tmp_path):
    words = {"dataset": str(tmp_path), "model": "torchvision:efficientnet_b3"}
    config = with_input_defaults(resolve(words))
    assert (config.image_size, config.crop_pct, config.interpolation) == (300, 0.9375, "bicubic")
    config = with_input_defaults(resolve({**words, "pretrained": False}))
    assert (config.image_size, config.crop_pct, config.interpolation) == (300, 1.0, "bilinear")


def test_layers_decay_as_timm_groups_them():
    model = build_model(**model_of("vit_tiny_patch16_224"))
    scales = layer_scales(model, 0.5)
    assert sorted(scales) == [0.5**i for i in range(13, -1, -1)]  # embedding, 12 blocks, head
    grouped = [parameter for group in scales.values() for parameter in group]
    assert {*map(id, grouped)} == {*map(id, model.parameters())}
    assert len(grouped) == len({*map(id, grouped)})


def test_head_of_a_distilled_model_has_two_layers():
    heads = classifier_param_names(**model_of("deit_tiny_distilled_patch16_224"))
    assert heads == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "timm has no model resnet19. Did you mean "),
        ("resnet18.a9_in1k", "timm has no weights a9_in1k of resnet18. Did you mean "),
        ("", "timm has no model. Known: "),
    ],
)
def test_p7_unknown_names(name, message):
    with pytest.raises(UserError) as caught:
        find_model(f"timm:{name}")
    assert str(caught.value).startswith(message)


def test_p7_errors(fails, monkeypatch, tmp_path):
    def offline(*_):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    argv = [*SMALL, "--model", "timm:resnet18", "--image-size", "32", "--pretrained"]
    message = fails(train, *argv)
    assert message.startswith("timm's weights timm/resnet18.a1_in1k cannot be loaded (no network).")
    message = fails(train, *SMALL, "--model", "timm:coatnet_pico_rw_224", "--pretrained")
    assert message.startswith("there are no pretrained weights for timm:coatnet_pico_rw_224.")
    message = fails(train, *SMALL, "--model", "timm:vit_tiny_patch16_224", "--image-size", "8")
    assert message.startswith("timm:vit_tiny_patch16_224 cannot take images of 8 pixels (")


def test_p7_without_timm(fails, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    message = "--model timm:NAME needs timm. Run pip install -e '.[timm]' in lab's checkout."
    assert fails(train, *SMALL, "--model", "timm:vgg11") == message


def test_regnet_cannot_be_built_on_the_meta_device_but_works(tmp_path):
    argv = [*SMALL, "--model", "torchvision:regnet_y_400mf", "--image-size", "32"]
    run = train.main([*argv, "--max-steps", "1", "--output-dir", str(tmp_path)])
    assert lab.load_model(run.path, "cpu")[1]["model"]["image_size"] == 32
    external._check_image_size.cache_clear()
    weights = []
    for _ in range(2):  # the first time, the image size is tried
        torch.manual_seed(0)
        model = {"num_classes": 10, "in_chans": 1, "image_size": 32}
        weights.append(build_model("torchvision:regnet_y_400mf", **model).fc.weight)
    assert torch.equal(*weights)
