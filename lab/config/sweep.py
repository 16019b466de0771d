"""The settings of a sweep: the options of sweep.py, and the file of fixed and searched settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.config.cli import read_settings, typed_setting
from lab.config.recipes import resolve
from lab.config.schema import (
    DEBUG,
    OUTPUT,
    QUIET,
    TASK,
    TRAINING,
    InvalidSettingError,
    TrainConfig,
    check_fields,
    is_code,
    option,
)
from lab.errors import UserError

SEARCH = "search"
# The settings that a sweep sets itself, and a time limit, after which a trial has no result.
NOT_ACCEPTED = (
    "name", "output_dir", "resume", "overwrite", "push_to_hub", "folds", "fold", "max_hours",
)  # fmt: skip
# Trials are compared by a metric on the validation split: these must be the same for all.
SAME_IN_ALL_TRIALS = (
    "dataset", "data_dir", "val_fraction", "test_fraction", "split_seed", "max_train_samples",
    "max_eval_samples", "skip_unreadable", "monitor",
)  # fmt: skip
NOT_SEARCHABLE = (*SAME_IN_ALL_TRIALS, "recipe", "seed")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, inclusive: integers for a setting that is an integer."""

    low: float
    high: float
    log: bool = False  # searched on a logarithmic scale


Searched = dict[str, Range | list[Any]]  # the range or the choices of each searched setting


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep."""

    # fmt: off
    file: str = option("", SEARCH,
        "YAML file with settings of train.py: values, lists of choices, and ranges",
        positional=True)
    trials: int = option(20, SEARCH,
        "number of trials, including those of an earlier call", low=1, metavar="N")
    seeds: int = option(3, SEARCH,
        "number of further runs of the best settings, with other seeds", low=0, metavar="N")
    pruner: str = option("median", SEARCH,
        "median: stop a trial whose best epoch so far is worse than the median of the complete "
        "trials at that epoch", choices=("median", "none"))
    seed: int = option(0, SEARCH,
        "random seed of the search; the seed of the runs is a setting", low=0, high=2**31 - 1)
    output: str = option("", OUTPUT,
        "directory of the sweep; default: sweeps/NAME for the file NAME.yaml", metavar="DIR")
    quiet: bool = QUIET(group=OUTPUT)
    debug: bool = DEBUG(group=OUTPUT)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def directory(self) -> Path:
        """The directory of the sweep."""
        return Path(self.output or Path("sweeps", Path(self.file).stem))


def read_sweep(path: Path) -> tuple[dict[str, Any], Searched, TrainConfig]:
    """Return the fixed and the searched settings in a sweep's file, and the first combination.

    Raises `UserError` for an unknown setting, an invalid value or range, or a setting that cannot
    be searched.
    """
    fixed: dict[str, Any] = {}
    searched: Searched = {}
    for name, value in read_settings(path, str(path), "Give a YAML file of settings").items():
        if name in NOT_ACCEPTED:
            raise UserError(
                f"{path} contains {name}, which a sweep does not accept", "Leave it out"
            )
        if not isinstance(value, (list, dict)):
            fixed[name] = typed_setting(name, value, path)
            continue
        searched[name] = _choices(name, value, path)
        group = TrainConfig.__dataclass_fields__[name].metadata["group"]
        if name in NOT_SEARCHABLE or group not in (TASK, TRAINING):
            raise UserError(f"{path} searches {name}, which cannot be searched", "Give one value")
    for name in ("model", "dataset"):
        for value in [fixed.get(name, ""), *_values(searched.get(name, []))]:
            if is_code(value):
                raise UserError(
                    f"{path} contains {value}, and code that a file names is not run",
                    "Add the model or dataset to lab (docs/extending.md)",
                )
    if not searched:
        raise UserError(
            f"{path} has no setting to search",
            "Write a list of choices, lr: [0.1, 0.01], or a range, lr: {low: 0.01, high: 0.1}",
        )
    first = resolve(fixed | {name: _values(values)[0] for name, values in searched.items()})
    if first.val_fraction == 0:
        raise UserError(
            "a sweep must not select settings on the test split, and val_fraction is 0",
            f"Write val_fraction: 0.1 into {path}",
        )
    for name, value in [(name, v) for name, values in searched.items() for v in _values(values)]:
        try:
            config = resolve(fixed | {name: value})
        except InvalidSettingError:
            raise
        except UserError:
            continue  # it may be valid with other values of the other settings
        for same in SAME_IN_ALL_TRIALS:
            if getattr(config, same) != getattr(first, same):
                raise UserError(
                    f"{name} {value} changes the default {same}", f"Write {same} into {path}"
                )
    return fixed, searched, first


def _values(values: Range | list[Any]) -> list[Any]:
    """Return the choices, or the ends of a range."""
    return [values.low, values.high] if isinstance(values, Range) else values


def _choices(name: str, value: Any, path: Path) -> Range | list[Any]:
    """Return the range or the choices that a sweep's file has for a setting."""
    if isinstance(value, list):
        choices = [typed_setting(name, choice, path) for choice in value]
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise InvalidSettingError(name, value, "two or more different choices", f" in {path}")
        return choices
    expected = "{low: NUMBER, high: NUMBER}, and log: true for a logarithmic scale"
    invalid = InvalidSettingError(name, value, expected, f" in {path}")
    if not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        raise invalid
    low, high = (typed_setting(name, value[end], path) for end in ("low", "high"))
    log = value.get("log", False)
    if type(low) not in (int, float) or type(log) is not bool:
        raise invalid
    if not low < high or (log and low <= 0):
        expected = "low < high, and low > 0 for a logarithmic scale"
        raise InvalidSettingError(name, value, expected, f" in {path}")
    return Range(low, high, log)
