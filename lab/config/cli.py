"""The command line of a config dataclass, and the settings files that --config reads."""

import argparse
import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from lab import console
from lab.config.recipes import RECIPES
from lab.config.schema import (
    MACHINE,
    InvalidSettingError,
    TrainConfig,
    flag,
    is_code,
    is_own_dataset,
    is_same_dataset,
)
from lab.errors import UserError, suggestion

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
# Settings in a run's config.json that another run does not take over: they name the run, concern
# its upload or its output on the terminal, or were measured ("threads").
RUN_SETTINGS = frozenset(
    ("name", "resume", "overwrite", "push_to_hub", "quiet", "debug", "threads")
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message, f"See `python {self.prog} --help`")

    def parse_args(self, args=None, namespace=None):
        # Intermixed: options may stand between positional arguments.
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            argument = unknown[0].split("=")[0]
            close = difflib.get_close_matches(argument, self._option_string_actions, 1)
            what = "unknown option" if argument.startswith("-") else "unexpected argument"
            hint = f"See `python {self.prog} --help`"
            if close and argument.startswith("-"):
                hint = f"Did you mean {close[0]}?"
            raise UserError(f"{what} {argument}", hint)
        return parsed


def parse_arguments(config: type, argv: list[str] | None, *, prog: str, description: str) -> dict:
    """Return the settings that the command line gives, by name.

    For `TrainConfig` they include those of the file that --config names, unless the command line
    overrides them, and "print_config" if that option is given.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if config is TrainConfig:
        group = parser.add_argument_group("settings file")
        group.add_argument("--config", metavar="FILE", help="YAML file, or config.json of a run, "
                           "with settings that the command line overrides")  # fmt: skip
        group.add_argument("--print-config", action="store_true",
                           help="print all settings as YAML for --config, and exit")  # fmt: skip
    groups: dict[str, Any] = {}
    kinds = _kinds(config)
    for f in dataclasses.fields(config):
        m = f.metadata
        group = groups.get(m["group"]) or parser.add_argument_group(m["group"])
        groups[m["group"]] = group
        kind = kinds[f.name]
        if m.get("positional"):
            group.add_argument(f.name, help=m["text"], nargs=m.get("nargs"))
            continue
        text = m["text"] + (" [recipe]" if m.get("from_recipe") else _default_text(f.default))
        option = {"help": text.replace("%", "%%")}
        if kind is bool:
            # --no-NAME turns off what a recipe, or the run that is resumed, turned on.
            negatable = m.get("from_recipe") or m["group"] == MACHINE
            option["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
        else:
            # check_fields checks choices: argparse's message depends on the version of Python.
            choices = "{" + ",".join(m["choices"]) + "}" if "choices" in m else None
            option["metavar"] = choices or m.get("metavar") or kind.__name__.upper()
        group.add_argument(flag(f.name), **option)
    settings = vars(parser.parse_args(argv))
    for f in dataclasses.fields(config):
        if f.metadata.get("nonempty") and settings.get(f.name) == "":  # often an unset variable
            raise UserError(f"{flag(f.name)} is empty", "Give a value, or leave out the option")
        if kinds[f.name] in (int, float) and f.name in settings:
            try:
                settings[f.name] = kinds[f.name](settings[f.name])
            except ValueError:
                expected = KINDS[kinds[f.name]]
                raise InvalidSettingError(flag(f.name), settings[f.name], expected) from None
    if config is TrainConfig and "config" in settings:
        return _with_config_file(settings)
    return settings


def _with_config_file(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the file that --config names, overridden by the command line's."""
    path = settings.pop("config")
    from_file = read_config(Path(path))
    for name in ("model", "dataset"):
        if is_code(from_file.get(name, "")) and name not in settings:
            raise UserError(
                f"the {name} in {path} is {from_file[name]}, code that runs only if you name "
                "it yourself",
                f"If you trust that file, add {flag(name)} {from_file[name]}",
            )
    of_recipes = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get("from_recipe")}
    recipe = settings.get("recipe", "")
    changes_recipe = recipe in RECIPES and recipe != from_file.get("recipe")
    if changes_recipe and of_recipes <= from_file.keys():
        raise UserError(
            f"--recipe {recipe} changes nothing: {path} has all settings that a recipe sets",
            "Leave out --recipe, or give a copy of that file without what the recipe should set",
        )
    dataset = settings.get("dataset", "")
    same = is_same_dataset(dataset, from_file.get("dataset", "")) and not is_code(dataset)
    if dataset and not same:  # in the file, these are of its own dataset
        names = ["revision", "image_column", "label_column"]
        if dataset == "digits" or is_own_dataset(dataset):  # which are not downloaded
            names.append("data_dir")
        for name in names:
            from_file.pop(name, None)
    return from_file | settings


def read_config(path: Path) -> dict[str, Any]:
    """Return the training settings in a YAML file, or in a run's config.json, by name.

    Of a run's config.json, what describes or names the run is left out. Raises `UserError` for a
    file that cannot be read, an unknown key or a value of the wrong type.
    """
    hint = "Give a YAML file, or the config.json of a run"
    content = read_settings(path, f"--config {path}", hint)
    if path.suffix == ".json" and "versions" in content:
        names = TrainConfig.__dataclass_fields__.keys() - RUN_SETTINGS
        content = {name: value for name, value in content.items() if name in names}
    settings = {name: typed_setting(name, value, path) for name, value in content.items()}
    if settings.get("data_dir") == TrainConfig.data_dir:
        del settings["data_dir"]  # datasets that are not downloaded accept none, but a run has one
    return settings


def read_settings(path: Path, name: str, hint: str) -> dict[Any, Any]:
    """Return the content of a YAML or JSON file of settings.

    If the file cannot be read, the `UserError` has its `name` in the command and the `hint`.
    """
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if is_json else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read {name} ({error.strerror})", hint) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        kind = "JSON" if is_json else "YAML"
        raise UserError(f"{path} is not valid {kind} ({reason})", "Correct the file") from None
    if content is None:  # an empty file
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of settings", "Write one `name: value` per line")
    return content


def print_config(config: TrainConfig) -> typing.NoReturn:
    """Print the settings as YAML, which --config reads, and exit with code 0."""
    if config.resume:
        raise UserError(
            "--print-config shows the settings of a new run, not of a resumed one",
            "Leave out --resume, or see the config.json of that run",
        )
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    console.print_line(text.rstrip())
    raise SystemExit(0)


def typed_setting(name: Any, value: object, path: Path) -> Any:
    """Return a value of a settings file as the type of the setting.

    Raises `UserError` if there is no setting of that name, or the value has another type.
    """
    if name not in TrainConfig.__dataclass_fields__:
        hint = suggestion(str(name), TrainConfig.__dataclass_fields__)
        raise UserError(f"unknown setting {name} in {path}", hint)
    choices = TrainConfig.__dataclass_fields__[name].metadata.get("choices", ())
    if value is False and "no" in choices:
        return "no"  # YAML reads an unquoted no as false
    kind = _kinds(TrainConfig)[name]
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3, which has no decimal point, as a string
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind:
        raise InvalidSettingError(name, value, KINDS[kind], f" in {path}")
    return value


def _kinds(config: type) -> dict[str, type]:
    """Return the type of each field; that of T for `T | None`."""
    kinds = typing.get_type_hints(config)
    for name, kind in kinds.items():
        if isinstance(kind, types.UnionType):
            kinds[name] = next(t for t in typing.get_args(kind) if t is not types.NoneType)
    return kinds


def _default_text(default: Any) -> str:
    return "" if default in ("", None, False) else f" [{default}]"
