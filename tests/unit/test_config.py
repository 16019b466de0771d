"""Settings: options and fields match one to one; recipes, --config and the command line layer."""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path

import pytest
import yaml

import train
from lab.checkpoint.weights import read_metadata
from lab.config.cli import parse_arguments, read_config
from lab.config.recipes import RECIPES, resolve
from lab.config.schema import EvalConfig, TrainConfig, flag
from lab.data import DATASETS
from lab.errors import UserError
from lab.models import MODELS, with_input_defaults

FIELDS = {
    config: {f.name: f for f in dataclasses.fields(config)} for config in (TrainConfig, EvalConfig)
}
# A valid value that is not the default, for fields where the default plus one is none.
OTHER = {
    "augment": "crop,flip",
    "tracker": "tensorboard,wandb",
    "mixup_alpha": 0.5,
    "recipe": "notebook",
    "model": "alexnet",
    "dataset": "digits",
    "val_fraction": 0.2,
    "test_fraction": 0.3,
    "folds": 5,
    "momentum": 0.5,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "lr_gamma": 0.1,
    "crop_pct": 0.5,
    "layer_decay": 0.5,
}
REQUIRED = {  # settings that others need
    "overwrite": {"name": "run"},
    "freeze": {"pretrained": True},
    "linear_probe": {"pretrained": True},
    "folds": {"fold": 1},
    "fold": {"folds": 5},
}


def parse(config, *words):
    return parse_arguments(config, list(words), prog="x.py", description="About x.")


def kind_of(config, name):
    kind = typing.get_type_hints(config)[name]
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    return kind


def other_value(config, name):
    f = FIELDS[config][name]
    if name in OTHER:
        return OTHER[name]
    if "choices" in f.metadata:
        return next(c for c in f.metadata["choices"] if c != f.default)
    kind = kind_of(config, name)
    return {bool: True, str: "other"}.get(kind) or kind((f.default or 0) + 1)


@pytest.mark.parametrize("config", FIELDS)
def test_each_field_has_an_option_of_its_type(config):
    required = ["some.safetensors"] if config is EvalConfig else []
    for name in FIELDS[config].keys() - {"weights"}:
        value, kind = other_value(config, name), kind_of(config, name)
        words = [flag(name)] if kind is bool else [flag(name), str(value)]
        settings = parse(config, *required, *words)
        settings.pop("weights", None)
        assert settings == {name: value}
        assert type(settings[name]) is kind
        made = config(**settings | REQUIRED.get(name, {}))
        assert getattr(made, name) == value != FIELDS[config][name].default


def test_a_switch_of_a_recipe_can_be_turned_off():
    assert parse(TrainConfig, "--no-decay-biases") == {"decay_biases": False}
    assert resolve({"recipe": "notebook"}).decay_biases
    assert not resolve({"recipe": "notebook", "decay_biases": False}).decay_biases


@pytest.mark.parametrize("words", [["--mod", "lenet5"], ["--Model", "lenet5"], ["lenet5"]])
def test_options_are_not_abbreviated_or_guessed(words):
    with pytest.raises(UserError, match=words[0]):
        parse(TrainConfig, *words)


@pytest.mark.parametrize("config", FIELDS)
def test_bounds_are_checked(config):
    for name, f in FIELDS[config].items():
        bounds = f.metadata
        invalid = [bounds["low"] - 1] if "low" in bounds else []
        invalid += [bounds["above"]] if "above" in bounds else []
        invalid += [bounds["high"] + 1] if "high" in bounds else []
        invalid += ["unknown"] if "choices" in bounds or "each_of" in bounds else []
        invalid += [f"none,{bounds['each_of'][0]}"] if "each_of" in bounds else []
        invalid += [float("nan")] if kind_of(config, name) is float else []
        for value in invalid:
            with pytest.raises(UserError, match=f"^invalid {flag(name)} '?{value}'?: expected "):
                config(**{name: value})
        for value in [bounds[b] for b in ("low", "high") if b in bounds]:
            assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize("config", FIELDS)
def test_help_lists_every_option_under_its_group(config, capsys):
    with pytest.raises(SystemExit):
        parse(config, "--help")
    text = capsys.readouterr().out
    assert "About x." in text
    sections = re.split(r"^(?=\S.*:$)", text, flags=re.M)
    for name, f in FIELDS[config].items():
        [section] = [s for s in sections if s.startswith(f.metadata["group"] + ":")]
        shown = name if f.metadata.get("positional") else flag(name)
        assert re.search(rf"^  {shown}\b", section, flags=re.M), shown
        assert f.metadata["text"].split()[0] in section
    from_recipe = [n for n, f in FIELDS[config].items() if f.metadata.get("from_recipe")]
    assert text.count("[recipe]") == len(from_recipe)


# Recipes


def test_every_recipe_resolves_for_every_pair():
    for recipe in RECIPES:
        for model in MODELS:
            for dataset in DATASETS:
                config = resolve({"recipe": recipe, "model": model, "dataset": dataset})
                assert (config.recipe, config.model, config.dataset) == (recipe, model, dataset)


def test_recipes_have_known_keys_and_settings():
    families = {re.split("[-:_]", model)[0] for model in [*MODELS, "torchvision:x", "timm:x"]}
    models = {*MODELS, *families}
    pairs = {f"{model}/{dataset}" for model in models for dataset in ["folder", *DATASETS]}
    for layers in RECIPES.values():
        assert layers.keys() <= {"*", "folder", *DATASETS} | models | pairs
        for settings in layers.values():
            for name, value in settings.items():
                assert FIELDS[TrainConfig][name].metadata.get("from_recipe")
                assert type(value) is kind_of(TrainConfig, name)


def test_a_model_has_a_default_dataset_and_image_size():
    for model, expected in {
        "lenet5": ("mnist", 32),
        "alexnet": ("cifar10", 32),
        "efficientnet_lite0": ("cifar10", 224),
    }.items():
        config = resolve({"model": model})
        assert (config.dataset, config.image_size) == expected
        assert resolve({"model": model, "image_size": 0}) == config


def test_a_family_of_models_shares_its_settings():
    recipe = RECIPES["default"]
    assert resolve({"model": "vit_hybrid"}).lr == recipe["vit"]["lr"]
    assert resolve({"model": "vit_tiny"}).max_grad_norm == recipe["vit"]["max_grad_norm"]
    small = resolve({"model": "vit_small", "dataset": "digits"})
    assert (small.lr, small.epochs) == (recipe["vit/digits"]["lr"], recipe["vit"]["epochs"])
    assert resolve({"model": "efficientnet_b3"}).epochs == recipe["efficientnet"]["epochs"]
    assert resolve({"model": "densenet121", "epochs": 3}).epochs == 3


def test_layers_apply_in_order_and_overrides_come_last(monkeypatch):
    layers = {
        "lenet5/digits": {"batch_size": 4},
        "lenet5": {"batch_size": 3, "epochs": 3},
        "digits": {"batch_size": 2, "epochs": 2, "lr": 0.2},
        "*": {"batch_size": 1, "epochs": 1, "lr": 0.1, "ema_decay": 0.5},
        "alexnet": {"ema_decay": 0.9},
        "lenet5/mnist": {"ema_decay": 0.9},
    }
    monkeypatch.setitem(RECIPES, "layered", layers)
    overrides = {"recipe": "layered", "model": "lenet5", "dataset": "digits"}
    config = resolve(overrides)
    assert (config.ema_decay, config.lr, config.epochs, config.batch_size) == (0.5, 0.2, 3, 4)
    config = resolve(overrides | {"batch_size": 5, "lr": 0.05})  # equal to a default
    assert (config.ema_decay, config.lr, config.epochs, config.batch_size) == (0.5, 0.05, 3, 5)


PUBLISHED = {
    "val_fraction": 0.0,  # the notebooks selected on the test split
    "max_train_samples": 0,
    "max_eval_samples": 0,
    "image_size": 32,
    "batch_size": 128,
    "max_steps": 0,
    "grad_accum_steps": 1,
    "dropout": -1,
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "decay_biases": True,
    "label_smoothing": 0.0,
    "schedule": "step",
    "warmup_epochs": 0.0,
    "lr_gamma": 0.5,
    "max_grad_norm": 0.0,
    "ema_decay": 0.0,
    "mixup_alpha": 1.0,
    "init": "default",
    "pretrained": False,
    "freeze": "none",
    "linear_probe": False,
    "layer_decay": 1.0,
    "fit": "crop",
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "monitor": "accuracy",
    "seed": 42,
}


@pytest.mark.parametrize(("overrides", "own"), [
    ({"model": "lenet5"},
     {"dataset": "mnist", "epochs": 5, "lr_step_epochs": 5, "augment": "none"}),
    ({"model": "alexnet"},
     {"dataset": "cifar10", "epochs": 20, "lr_step_epochs": 10, "augment": "crop,flip"}),
])  # fmt: skip
def test_the_notebook_recipe_is_the_published_one(overrides, own):
    config = dataclasses.asdict(resolve({"recipe": "notebook"} | overrides))
    expected = PUBLISHED | own
    assert {name: config[name] for name in expected} == expected
    from_recipe = {n for n, f in FIELDS[TrainConfig].items() if f.metadata.get("from_recipe")}
    assert from_recipe <= expected.keys()  # all are checked


# --config and --print-config


def test_the_command_line_overrides_a_settings_file_which_overrides_the_recipe(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "model: alexnet  # a comment\nepochs: 3\nlr: 1e-3\nmixed_precision: no\nweight_decay: 0\n"
    )
    settings = parse(TrainConfig, "--epochs", "4", "--config", str(path))
    assert settings == {
        "model": "alexnet", "epochs": 4, "lr": 0.001, "mixed_precision": "no", "weight_decay": 0.0,
    }  # fmt: skip
    assert resolve(settings).dropout == RECIPES["default"]["alexnet"]["dropout"]
    path.write_text("")
    assert parse(TrainConfig, "--config", str(path)) == {}


def test_print_config_prints_what_config_reads(tmp_path, capsys):
    words = ["--dataset", "digits", "--mixed-precision", "no", "--lr", "1e-05", "--name", "x"]
    path, printed = tmp_path / "settings.yaml", []
    for arguments in (words, ["--config", str(path)]):
        with pytest.raises(SystemExit) as exit_:
            train.main([*arguments, "--print-config"])
        assert not exit_.value.code
        printed.append(capsys.readouterr().out)
        path.write_text(printed[-1])
    assert printed[0] == printed[1]
    expected = resolve(parse(TrainConfig, *words))
    assert yaml.safe_load(printed[0]) == dataclasses.asdict(expected)


def test_the_config_of_a_run_gives_its_training_settings(finished, capsys):
    path = finished / "config.json"
    saved = json.loads(path.read_text())
    settings = read_config(path)
    left_out = {"name", "resume", "overwrite", "push_to_hub", "quiet", "debug", "threads"}
    assert settings.keys() == FIELDS[TrainConfig].keys() - left_out - {"data_dir"}
    assert all(saved[name] == value for name, value in settings.items())
    with pytest.raises(SystemExit):
        train.main(["--config", str(path), "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {name: printed[name] for name in settings} == settings
    assert printed["name"] == ""
    assert read_metadata(finished / "best.safetensors")["seed"] == printed["seed"]


def test_p7_a_recipe_beside_a_file_with_all_settings(finished, fails, tmp_path):
    path = finished / "config.json"
    words = ["--config", str(path), "--recipe", "notebook"]
    expected = f"--recipe notebook changes nothing: {path} has all settings that a recipe sets. "
    assert fails(train, *words).startswith(expected)
    mistyped = fails(train, "--config", str(path), "--recipe", "notebooks")
    assert mistyped.startswith("unknown recipe notebooks. Did you mean notebook?")
    part = tmp_path / "part.yaml"
    part.write_text("recipe: default\nlr: 0.5\n")
    settings = resolve(parse(TrainConfig, "--config", str(part), "--recipe", "notebook"))
    assert (settings.recipe, settings.lr, settings.schedule) == ("notebook", 0.5, "step")


def test_the_columns_of_a_settings_file_are_those_of_its_dataset(tmp_path):
    path = tmp_path / "a.yaml"
    content = "dataset: hf:some/images\nlabel_column: coarse\nrevision: main\ndata_dir: d\n"
    path.write_text(content)
    same, other = ("coarse", "main", "d"), (None, None, None)
    downloaded = (None, None, "d")
    cases = {"hf:some/images": same, "hf:other": other, "digits": other, "cifar10": downloaded}
    for dataset, columns in cases.items():
        words = ["--config", str(path), "--dataset", dataset]
        settings = parse_arguments(TrainConfig, words, prog="train.py", description="")
        names = ("label_column", "revision", "data_dir")
        assert tuple(map(settings.get, names)) == columns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "epoch: 3", "unknown setting epoch in a.yaml. Did you mean epochs?"),
        ("a.yaml", "batch-size: 3", "unknown setting batch-size in a.yaml. Did you mean batch"),

        ("a.json", '{"device": "cpu"}', "unknown setting device in a.json. "),

        ("a.yaml", "epochs: 1.5",
         "invalid epochs 1.5 in a.yaml: expected an integer."),

        ("a.yaml", "lr: fast", "invalid lr 'fast' in a.yaml: expected a number."),

        ("a.yaml", "model:", "invalid model None in a.yaml: expected a string."),

        ("a.yaml", "compile: 1", "invalid compile 1 in a.yaml: expected true or false."),
        ("a.yaml", "epochs: -1", "invalid --epochs -1: expected at least 0."),
        ("a.yaml", "epochs", "a.yaml is not a mapping of settings. Write one `name: value` per "),

        ("a.yaml", "!!python/object/apply:os.system [ls]", "a.yaml is not valid YAML ("),
        ("a.json", "{", "a.json is not valid JSON ("),

        ("a.yaml", None, "cannot read --config a.yaml (No such file or directory). Give a YAML"),
    ],
)  # fmt: skip
def test_p7_mistakes_in_a_settings_file(fails, name, content, message):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert fails(train, "--config", name, "--dataset", "digits").startswith(message)


def test_p7_print_config_is_for_new_runs(fails):
    assert fails(train, "--resume", "runs/x", "--print-config").startswith("--print-config shows")


def test_own_images_and_pretrained_weights_give_fine_tuning_as_the_weights_expect():
    for model in ("efficientnet_b0", "torchvision:efficientnet_b0"):
        settings = {"dataset": "./images", "model": model, "pretrained": True}
        config = with_input_defaults(resolve(settings))
        expected = ("finetune", 224, 0.875, "bicubic")
        assert (config.recipe, config.image_size, config.crop_pct, config.interpolation) == expected
        assert with_input_defaults(resolve(settings | {"image_size": 64})).image_size == 64
    assert resolve({"dataset": "./images", "model": "efficientnet_b0"}).recipe == "default"
    config = with_input_defaults(resolve({"model": "efficientnet_b0", "pretrained": True}))
    assert (config.recipe, config.image_size) == ("default", 32)
