"""Settings: flags and fields are one to one, and recipes are layered under the command line."""

import dataclasses
import json
import re
import types
import typing

import pytest

from lab.config.cli import parse_arguments
from lab.config.recipes import RECIPES, resolve
from lab.config.schema import EvalConfig, TrainConfig, flag
from lab.data import DATASETS
from lab.models import MODELS

FIELDS = {
    config: {f.name: f for f in dataclasses.fields(config)} for config in (TrainConfig, EvalConfig)
}
# Another valid value than the default of each field where adding one to it gives none.
OTHER = {
    "augment": "crop,flip",
    "tracker": "tensorboard,wandb",
    "mixup_alpha": 0.5,
    "recipe": "notebook",
    "model": "alexnet",
    "dataset": "digits",
    "val_fraction": 0.2,
    "test_fraction": 0.3,
    "momentum": 0.5,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "lr_gamma": 0.1,
}


def parse(config, *words):
    return parse_arguments(config, list(words), prog="x.py", metadata="About x.")


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


PAIRS = [(c, n) for c, fields in FIELDS.items() for n in fields if n != "weights"]


@pytest.mark.parametrize(("config", "name"), PAIRS)
def test_each_field_has_its_flag(config, name):
    value = other_value(config, name)
    words = [flag(name)] if kind_of(config, name) is bool else [flag(name), str(value)]
    required = ["some.safetensors"] if config is EvalConfig else []
    given = parse(config, *required, *words)
    given.pop("weights", None)
    assert given == {name: value}
    assert type(given[name]) is kind_of(config, name)
    # What means nothing without another.
    hub = {"push_to_hub": "name"}
    with_it = {"overwrite": {"name": "run"}, "freeze": {"pretrained": True}}
    given |= (with_it | {"hub_images": hub, "hub_public": hub}).get(name, {})
    made = config(**given)
    assert getattr(made, name) == value != FIELDS[config][name].default


def test_what_is_not_given_is_absent():
    assert parse(TrainConfig) == {}
    assert parse(EvalConfig, "runs/x") == {"weights": "runs/x"}


@pytest.mark.parametrize("name", ["decay_biases"])
def test_what_a_recipe_turns_on_can_be_turned_off(name):
    assert parse(TrainConfig, f"--no-{name.replace('_', '-')}") == {name: False}
    assert resolve({"recipe": "notebook"}).decay_biases
    assert not resolve({"recipe": "notebook", "decay_biases": False}).decay_biases


@pytest.mark.parametrize("words", [["--mod", "lenet5"], ["--Model", "lenet5"], ["lenet5"]])
def test_flags_are_not_abbreviated_or_guessed(words):
    with pytest.raises(ValueError, match=words[0]):
        parse(TrainConfig, *words)


@pytest.mark.parametrize(("config", "name"), PAIRS)
def test_bounds_are_checked_and_named(config, name):
    bounds = FIELDS[config][name].metadata
    wrong = [bounds["low"] - 1] if "low" in bounds else []
    wrong += [bounds["above"]] if "above" in bounds else []
    wrong += [bounds["high"] + 1] if "high" in bounds else []
    wrong += ["nothing known"] if "choices" in bounds else []
    wrong += [float("nan")] if kind_of(config, name) is float else []
    for value in wrong:
        with pytest.raises(ValueError, match=flag(name)):
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


def test_settings_survive_json():
    config = resolve({"model": "alexnet", "augment": "crop,cutout"})
    text = json.dumps(dataclasses.asdict(config))
    assert TrainConfig(**json.loads(text)) == config


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", ()), ("", ()), ("crop", ("crop",)), ("flip, crop", ("flip", "crop"))],
)
def test_augment_is_a_list_of_names(text, names):
    assert TrainConfig(augment=text).augmentations == names


@pytest.mark.parametrize("augment", ["crops", "crop,blur", "crop;flip"])
def test_unknown_augmentations_are_refused(augment):
    with pytest.raises(ValueError, match="--augment has no"):
        TrainConfig(augment=augment)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves_for_every_pair(recipe, model, dataset):
    config = resolve({"recipe": recipe, "model": model, "dataset": dataset})
    assert (config.recipe, config.model, config.dataset) == (recipe, model, dataset)
    assert config.image_size == MODELS[model].image_size


def test_the_keys_of_recipes_are_known_and_set_what_recipes_may():
    families = {re.split("[-:]", model)[0] for model in MODELS}
    pairs = {f"{model}/{dataset}" for model in {*MODELS, *families} for dataset in DATASETS}
    for layers in RECIPES.values():
        assert layers.keys() <= {"*", *DATASETS, *MODELS, "torchvision"} | pairs
        for settings in layers.values():
            assert all(FIELDS[TrainConfig][n].metadata.get("from_recipe") for n in settings)


def test_a_model_brings_its_own_data_set_and_image_size():
    for name, spec in MODELS.items():
        config = resolve({"model": name})
        assert (config.dataset, config.image_size) == (spec.dataset, spec.image_size)


def test_a_family_of_models_shares_its_settings():
    """The name up to the first hyphen or colon; a model's own layer comes after it."""
    recipe = RECIPES["default"]
    assert resolve({"model": "vit_hybrid"}).lr == recipe["vit"]["lr"]
    assert resolve({"model": "vit"}).max_grad_norm == recipe["vit"]["max_grad_norm"]
    small = resolve({"model": "vit_small", "dataset": "digits"})
    assert (small.lr, small.epochs) == (recipe["vit/digits"]["lr"], recipe["vit"]["epochs"])
    assert resolve({"model": "efficientnet_b3"}).epochs == recipe["efficientnet"]["epochs"]
    assert resolve({"model": "densenet121", "epochs": 3}).epochs == 3


def test_layers_apply_in_order_and_the_command_line_comes_last(monkeypatch):
    layers = {
        "lenet5/digits": {"batch_size": 4},
        "lenet5": {"batch_size": 3, "epochs": 3},
        "digits": {"batch_size": 2, "epochs": 2, "lr": 0.2},
        "*": {"batch_size": 1, "epochs": 1, "lr": 0.1, "ema_decay": 0.5},
        "alexnet": {"ema_decay": 0.9},
        "lenet5/mnist": {"ema_decay": 0.9},
    }
    monkeypatch.setitem(RECIPES, "tried", layers)
    given = {"recipe": "tried", "model": "lenet5", "dataset": "digits"}
    config = resolve(given)
    assert (config.ema_decay, config.lr, config.epochs, config.batch_size) == (0.5, 0.2, 3, 4)
    config = resolve(given | {"batch_size": 5, "lr": 0.05})  # each equal to a default
    assert (config.ema_decay, config.lr, config.epochs, config.batch_size) == (0.5, 0.05, 3, 5)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 32), ({"image_size": 0}, 32), ({"image_size": 64}, 64)]
)
def test_the_image_size_given_wins_and_zero_means_the_models(given, expected):
    assert resolve({"model": "lenet5"} | given).image_size == expected


@pytest.mark.parametrize("given", [{"model": "x"}, {"dataset": "x"}, {"recipe": "x"}])
def test_unknown_names_are_refused_with_the_known(given):
    known = {"model": MODELS, "dataset": DATASETS, "recipe": RECIPES}[next(iter(given))]
    with pytest.raises(ValueError, match=f"x.*{list(known)[-1]}"):
        resolve(given)


PUBLISHED = {
    "val_fraction": 0.0,  # the notebooks chose on the test split
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
    "monitor": "accuracy",
    "seed": 42,
}


@pytest.mark.parametrize(("given", "own"), [
    ({"model": "lenet5"},
     {"dataset": "mnist", "epochs": 5, "lr_step_epochs": 5, "augment": "none"}),
    ({"model": "alexnet"},
     {"dataset": "cifar10", "epochs": 20, "lr_step_epochs": 10, "augment": "crop,flip"}),
])  # fmt: skip
def test_the_notebook_recipe_is_the_published_one(given, own):
    config = dataclasses.asdict(resolve({"recipe": "notebook"} | given))
    expected = PUBLISHED | own
    assert {name: config[name] for name in expected} == expected
    recipe_sets = {n for n, f in FIELDS[TrainConfig].items() if f.metadata.get("from_recipe")}
    assert recipe_sets <= expected.keys()  # none is left unchecked
