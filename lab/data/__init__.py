"""DATASETS: every data set by name; load_splits reads one.

Listing them imports no torch.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data.sources import Parts, Split

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class DatasetSpec:
    """How a data set is read, and how its pixels are normalised."""

    read: str  # "module:function" in this package; returns Parts
    mean: Numbers | None = None  # a channel, in units of the full range; None: measured
    std: Numbers | None = None


DATASETS = {
    "mnist": DatasetSpec("sources:read_mnist", (0.1307,), (0.3081,)),
    "fashion-mnist": DatasetSpec("sources:read_fashion_mnist", (0.2860,), (0.3530,)),
    "cifar10": DatasetSpec(
        "sources:read_cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": DatasetSpec(
        "sources:read_cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "digits": DatasetSpec("sources:read_digits"),
    "shapes": DatasetSpec("sources:read_shapes"),
    "folder": DatasetSpec("folder:read_folder"),
}


def find_dataset(name: str) -> DatasetSpec:
    """The spec of a data set; raises `UserError` with the list of the known."""
    if name not in DATASETS:
        raise UserError(f"there is no data set {name}", f"Known: {', '.join(DATASETS)}")
    return DATASETS[name]


@dataclass(frozen=True)
class DataConfig:
    """All that decides which samples a split holds; kept in the weights' metadata.

    Fields as in TrainConfig.
    """

    dataset: str
    data_dir: str
    image_size: int
    val_fraction: float
    test_fraction: float
    split_seed: int
    num_samples: int
    limit_train: int
    limit_eval: int

    @classmethod
    def of(cls, settings: Any) -> DataConfig:
        """The fields that are attributes of `settings`, a TrainConfig."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Splits:
    """The parts of a data set, at one image size, and how to normalise their pixels.

    `val` is what the best epoch is chosen on: a cut of the training split, or the test split
    itself where `selected_on` says "test".
    """

    train: Split
    val: Split
    test: Split
    mean: Numbers
    std: Numbers
    selected_on: str  # "validation" or "test"

    def named(self, name: str) -> Split:
        """The split "train", "val" or "test"; raises `UserError` where no `val` was cut."""
        if name == "val" and self.selected_on == "test":
            raise UserError(
                "this data has no validation split: the best epoch was chosen on the test split",
                "Give --split test",
            )
        return getattr(self, name)


def load_splits(config: DataConfig, memory: float, num_threads: int) -> Splits:
    """The splits of a data set; the same for the same settings, on every process.

    Pictures in files are decoded, by `num_threads` threads, where all of them take at most
    `memory` bytes, and stay in files otherwise. Raises `UserError` where files are missing,
    damaged or too few.
    """
    from lab.data.sources import channel_statistics, limit, stratified_cut

    parts, seed = _read(config), config.split_seed
    train, val, test = parts.train, parts.val, parts.test
    if test is None:
        train, test = stratified_cut(train, config.test_fraction, seed)
    if val is None and config.val_fraction > 0:
        train, val = stratified_cut(train, config.val_fraction, seed)
    splits = {"training": limit(train, config.limit_train, seed)}
    splits["test"] = limit(test, config.limit_eval, seed)
    if val is not None:
        splits["validation"] = limit(val, config.limit_eval, seed)
    train, test, *cut = _ready(splits, config, memory, num_threads)
    spec = find_dataset(config.dataset)
    mean, std = spec.mean, spec.std
    if mean is None or std is None:
        mean, std = channel_statistics(train.images)
    val, selected_on = (cut[0], "validation") if cut else (test, "test")
    return Splits(train, val, test, mean, std, selected_on)


def load_whole(config: DataConfig, memory: float, num_threads: int) -> Split:
    """All of a data set that comes in one piece, uncut; at most `limit_eval` samples of it."""
    from lab.data.sources import limit

    parts = _read(config)
    if parts.test is not None:
        raise UserError(f"{config.dataset} comes in splits", "Give --split test, val or train")
    whole = limit(parts.train, config.limit_eval, config.split_seed)
    return _ready({"whole": whole}, config, memory, num_threads)[0]


def _read(config: DataConfig) -> Parts:
    module, read = find_dataset(config.dataset).read.split(":")
    return getattr(importlib.import_module(f"lab.data.{module}"), read)(config)


def _ready(
    named: dict[str, Split], config: DataConfig, memory: float, num_threads: int
) -> list[Split]:
    """The splits decoded, where all of them fit into `memory`, and at the image size."""
    from lab.data.sources import in_memory, resize

    for name, split in named.items():
        if len(split.labels) == 0:
            raise UserError(f"the {name} split is empty", "Add pictures, or change the fractions")
    splits = list(named.values())
    if sum(math.prod(split.images.shape) for split in splits) <= memory:
        splits = [in_memory(split, num_threads) for split in splits]
    return [resize(split, config.image_size) for split in splits]
