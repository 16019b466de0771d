"""option, flag, check_fields: what makes a dataclass field a command-line flag with bounds."""

import dataclasses
import math
from dataclasses import field
from typing import Any

from lab.errors import UserError


def option(default: Any, group: str, text: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag: its `--help` group and text, its bounds.

    `metadata`: `choices`, `each_of` (choices of a list with commas), `low` and `high` (inclusive
    bounds), `above` (exclusive lower bound), `from_recipe` (the recipe sets it), `filled` (not
    given as an empty text), `metavar`.
    """
    return field(default=default, metadata={"group": group, "text": text, **metadata})


def listed(text: str) -> tuple[str, ...]:
    """The names in a list with commas, in order; none in "none"."""
    return tuple(name for name in text.replace(" ", "").split(",") if name not in ("", "none"))


def flag(name: str) -> str:
    """The command-line flag of a field: `--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def check_fields(config: Any) -> None:
    """Nothing; raises `UserError` for the first field outside its choices or bounds."""
    for f in dataclasses.fields(config):
        value, m = getattr(config, f.name), f.metadata
        if value is None:
            continue
        if "choices" in m and value not in m["choices"]:
            raise UserError(
                f"{flag(f.name)} has no {value}", f"Choose from {', '.join(m['choices'])}"
            )
        names = listed(value) if "each_of" in m else ()
        if unknown := sorted(set(names) - set(m.get("each_of", ()))):
            raise UserError(
                f"{flag(f.name)} has no {', '.join(unknown)}",
                f"Choose from {', '.join(m['each_of'])}, or none",
            )
        if len(set(names)) < len(names):
            raise UserError(f"{flag(f.name)} {value} repeats a name", "Name each once")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(f.name)} is {value}", "Give a finite number")
        if "low" in m and value < m["low"]:
            raise UserError(f"{flag(f.name)} {value} is too low", f"Give at least {m['low']}")
        if "above" in m and value <= m["above"]:
            raise UserError(f"{flag(f.name)} {value} is too low", f"Give more than {m['above']:g}")
        if "high" in m and value > m["high"]:
            raise UserError(f"{flag(f.name)} {value} is too high", f"Give at most {m['high']}")
