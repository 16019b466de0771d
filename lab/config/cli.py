"""The command line of a config dataclass: its flags, their help, what was given."""

import argparse
import dataclasses
import difflib
import types
import typing
from typing import Any

from lab.config.schema import MACHINE, flag
from lab.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message, f"See `python {self.prog} --help`")

    def parse_args(self, args=None, namespace=None):
        # Intermixed: options may stand between what has a place.
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if not word.startswith("-"):
                raise UserError(f"{word} is one word too many", f"See `python {self.prog} --help`")
            close = difflib.get_close_matches(word, self._option_string_actions, 1)
            hint = f"Did you mean {close[0]}?" if close else f"See `python {self.prog} --help`"
            raise UserError(f"there is no option {word}", hint)
        return parsed


def parse_arguments(config: type, argv: list[str] | None, *, prog: str, description: str) -> dict:
    """The settings that were given on the command line, name -> value, and no others."""
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        m = f.metadata
        group = groups.get(m["group"]) or parser.add_argument_group(m["group"])
        groups[m["group"]] = group
        kind = hints[f.name]
        if isinstance(kind, types.UnionType):  # `int | None`: None means "not given"
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        if m.get("positional"):
            group.add_argument(f.name, help=m["text"], nargs=m.get("nargs"))
            continue
        text = m["text"] + (" [recipe]" if m.get("from_recipe") else _default_text(f.default))
        settings = {"help": text.replace("%", "%%")}
        if kind is bool:
            both_ways = argparse.BooleanOptionalAction
            settings["action"] = both_ways if _both_ways(f) else "store_true"
        else:
            # Choices are checked by check_fields: argparse words it by the version of Python.
            choices = "{" + ",".join(m["choices"]) + "}" if "choices" in m else None
            settings |= {
                "type": kind,
                "metavar": choices or m.get("metavar") or kind.__name__.upper(),
            }
        group.add_argument(flag(f.name), **settings)
    given = vars(parser.parse_args(argv))
    for f in dataclasses.fields(config):
        if f.metadata.get("filled") and given.get(f.name) == "":  # of an unset variable, as a rule
            raise UserError(f"{flag(f.name)} is empty", "Name it, or leave the option out")
    return given


def _both_ways(f: dataclasses.Field) -> bool:
    """Whether a switch has a --no- form: what a recipe, or the run that is resumed, turned on."""
    return bool(f.metadata.get("from_recipe")) or f.metadata["group"] == MACHINE


def _default_text(default: Any) -> str:
    return "" if default in ("", None, False) else f" [{default}]"
