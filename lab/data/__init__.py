"""The datasets by name, the checks of their settings, and the settings of the data.

Importing this module imports no torch, so that `--help` is fast.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lab.config.schema import HUB, flag, is_code, is_own_dataset
from lab.errors import UserError, suggestion

Numbers = tuple[float, ...]
TITLES = {"train": "training", "val": "validation", "test": "test"}  # of splits, in messages


@dataclass(frozen=True)
class DatasetSpec:
    """Describe how a dataset is read, and how its pixels are normalized."""

    read: str  # "module:function" in this package; returns RawSplits
    mean: Numbers | None = None  # of each channel, for pixels from 0 to 1; None: measured
    std: Numbers | None = None
    uses_data_dir: bool = True
    # `read` takes a second argument, which says whether it may download, or import the user's code.
    downloads: bool = False


DATASETS = {
    "mnist": DatasetSpec("torchvision_datasets:read_mnist", (0.1307,), (0.3081,), downloads=True),
    "fashion-mnist": DatasetSpec(
        "torchvision_datasets:read_fashion_mnist", (0.2860,), (0.3530,), downloads=True
    ),
    "cifar10": DatasetSpec(
        "torchvision_datasets:read_cifar10",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        downloads=True,
    ),
    "cifar100": DatasetSpec(
        "torchvision_datasets:read_cifar100",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        downloads=True,
    ),
    "digits": DatasetSpec("digits:read_digits", uses_data_dir=False),
}
# Any other `dataset` begins with HUB, is FILE.py:FUNCTION, or is a path.
HUGGING_FACE = DatasetSpec("hugging_face:read_hub", uses_data_dir=False, downloads=True)
OWN = DatasetSpec("own_dataset:read_own", uses_data_dir=False, downloads=True)
FOLDER = DatasetSpec("image_folder:read_folder", uses_data_dir=False)


def find_dataset(dataset: str) -> DatasetSpec:
    """Return the spec of a dataset, as `--dataset` gives it."""
    if not is_own_dataset(dataset):
        return DATASETS[dataset]
    if dataset.startswith(HUB):
        return HUGGING_FACE
    return OWN if is_code(dataset) else FOLDER


def is_named(dataset: str, overrides: Collection[str]) -> bool:
    """Return whether the user named what the dataset is downloaded to, or imported from.

    `overrides` are the names of the settings that come from the user, not from weights or a
    checkpoint.
    """
    return ("data_dir" if find_dataset(dataset).uses_data_dir else "dataset") in overrides


def check_dataset(dataset: str, given: Mapping[str, Any]) -> None:
    """Raise `UserError` if the dataset is unknown, or an option is given and has no effect.

    `given` are the settings that the user gave. A path that contains a separator is not checked:
    only one process reports a missing directory.
    """
    if (
        is_own_dataset(dataset)
        and not dataset.startswith(HUB)
        and not any(c in dataset for c in "/\\.")
        and not os.path.exists(dataset)
    ):
        if given.get("dataset") is None:  # it is that of the weights
            raise UserError(
                f"there is no directory {dataset}, the dataset of the training",
                "Give --dataset with its path",
            )
        hint = suggestion(dataset, [*DATASETS, "a directory of images"])
        raise UserError(f"unknown dataset {dataset}", hint)
    spec = find_dataset(dataset)
    if given.get("data_dir") is not None and not spec.uses_data_dir:
        raise UserError(
            f"{dataset} is not read from --data-dir {given['data_dir']}",
            "Leave it out; for a directory of images, give --dataset DIRECTORY",
        )
    for name in ("image_column", "label_column", "revision"):
        # A run that is resumed has a dataset of its own, which is not known yet.
        if given.get(name) and spec is not HUGGING_FACE and not given.get("resume"):
            raise UserError(
                f"{flag(name)} is for a Hugging Face dataset, not for {dataset}",
                f"Leave it out, or give --dataset {HUB}NAME",
            )


@dataclass(frozen=True)
class DataConfig:
    """The settings that decide which samples a split contains, as fields of `TrainConfig`.

    They are saved in the metadata of the weights.
    """

    dataset: str
    data_dir: str
    image_size: int
    val_fraction: float
    test_fraction: float
    split_seed: int
    max_train_samples: int
    max_eval_samples: int
    skip_unreadable: bool = False
    fit: str = "crop"
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    image_column: str = ""
    label_column: str = ""
    # The version of the data: the commit of a Hugging Face dataset, or the SHA-256 of the file of
    # FILE.py:FUNCTION.
    revision: str = ""
    folds: int = 0
    fold: int = 0

    @classmethod
    def of(cls, settings: Any) -> DataConfig:
        """Return the data settings of a `TrainConfig`."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})
