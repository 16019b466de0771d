"""DATASETS: every data set by name; load_splits reads one.

Listing them imports no torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lab import console
from lab.errors import UserError, name_some, suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from lab.data.fingerprint import Listing
    from lab.data.types import RawSplits, Split

Numbers = tuple[float, ...]
TITLES = {"train": "training", "val": "validation", "test": "test"}  # of splits, for people


@dataclass(frozen=True)
class DatasetSpec:
    """How a data set is read, and how its pixels are normalised."""

    read: str  # "module:function" in this package; returns Parts
    mean: Numbers | None = None  # a channel, in units of the full range; None: measured
    std: Numbers | None = None
    bundled: bool = False  # it comes with lab: no file below --data-dir is read
    downloads: bool = False  # `read` takes a second argument: whether it may download


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
    "digits": DatasetSpec("digits:read_digits", bundled=True),
    "folder": DatasetSpec("image_folder:read_folder"),
}


def find_dataset(name: str) -> DatasetSpec:
    """The spec of a data set; raises `UserError` with the list of the known."""
    if name not in DATASETS:
        raise UserError(f"there is no data set {name}", suggestion(name, DATASETS))
    return DATASETS[name]


def check_dataset(dataset: str, data_dir: str | None) -> None:
    """Raise `UserError` for an unknown dataset, and for a --data-dir that a bundled one ignores."""
    if find_dataset(dataset).bundled and data_dir is not None:
        raise UserError(
            f"{dataset} is bundled with lab and reads nothing from --data-dir {data_dir}",
            "Leave it out; for a directory of images, give --dataset folder",
        )


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
    max_train_samples: int
    max_eval_samples: int
    skip_unreadable: bool = False

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
    selection_split: str  # "validation" or "test"
    fingerprints: dict[str, str]  # of "train", "val", "test": which samples are in it

    def class_counts(self) -> dict[str, list[int]]:
        """Return the number of images of each class in the training, validation and test split."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if self.val is self.test:
            del splits["val"]
        return {
            TITLES[name]: split.labels.bincount(minlength=len(split.class_names)).tolist()
            for name, split in splits.items()
        }

    def choose_loader(self, kind: str, memory: float) -> str:
        """Return which loader `kind` "auto" stands for: "resident" or "streaming".

        Resident where all splits are in memory and take at most `memory` bytes together.
        """
        if kind != "auto":
            return kind
        from torch import Tensor

        images = {id(s.images): s.images for s in (self.train, self.val, self.test)}.values()
        decoded = all(isinstance(one, Tensor) for one in images)
        fits = sum(math.prod(one.shape) for one in images) <= memory
        return "resident" if decoded and fits else "streaming"


def load_splits(
    config: DataConfig, memory: float, num_workers: int, download: bool = True
) -> Splits:
    """The splits of a data set; the same for the same settings, on every process.

    Images are decoded, by `num_workers` processes, and resized where all splits together take at
    most `memory` bytes; otherwise that is left to the loader. Raises `UserError` where files are
    missing, damaged or too few.
    """
    from lab.data.fingerprint import fingerprint
    from lab.data.splits import channel_statistics

    cut = _split(_read(config, download), config)
    if len(cut["train"].class_names) < 2:
        raise UserError(
            f"{config.data_dir} holds one class, {cut['train'].class_names[0]}",
            "Two or more are needed, each with the pictures of one class",
        )
    _check_classes(cut, config)
    if config.skip_unreadable:
        cut = _skip_unreadable(cut, num_workers)
    named = _ready(cut, config, memory, num_workers)
    spec = find_dataset(config.dataset)
    mean, std = spec.mean, spec.std
    if mean is None or std is None:
        counts = _cached_histogram(cut, named["train"], num_workers)
        mean, std = channel_statistics(named["train"].images, counts)
    selection_split = "validation" if "val" in named else "test"
    val = named.get("val", named["test"])
    fingerprints = {name: fingerprint(split) for name, split in cut.items()}
    return Splits(named["train"], val, named["test"], mean, std, selection_split, fingerprints)


def load_split(
    config: DataConfig, name: str, memory: float, num_workers: int, download: bool = True
) -> tuple[Split, str]:
    """The split "train", "val" or "test" alone, or "all" of the data; and its fingerprint.

    "all" is every sample of every part, or `limit_eval` of them. Without `download`, data that are
    not in `data_dir` are an error. Raises `UserError` where there is no such split.
    """
    from lab.data.fingerprint import fingerprint

    cut = _split(_read(config, download), config, whole=name == "all")
    if name not in cut:
        raise UserError(
            "this data has no validation split: the best epoch was chosen on the test split",
            "Give --split test",
        )
    one, use_cache = {name: cut[name]}, _is_worth_caching(cut)
    if config.skip_unreadable:
        one = _skip_unreadable(one, num_workers)
    split = _ready(one, config, memory, num_workers, use_cache)[name]
    return split, fingerprint(one[name])


def load_fingerprints(
    config: DataConfig, download: bool = True, num_workers: int = 1
) -> dict[str, str]:
    """Return the fingerprints of the splits "train", "test" and, if there is one, "val"."""
    from lab.data.fingerprint import fingerprint

    cut = _split(_source(config, download), config)
    if config.skip_unreadable:
        cut = _skip_unreadable(cut, num_workers, warn=False)
    return {name: fingerprint(split) for name, split in cut.items()}


def list_samples(config: DataConfig, name: str | None = None, num_workers: int = 1) -> Listing:
    """Return what the data hold, to compare with another process's copy of them.

    `name` is that of the only split in use; None: train, val and test are.
    """
    from lab.data.fingerprint import Listing

    parts = _source(config, download=False)  # they have been read before
    cut = _split(parts, config, whole=name == "all")
    cut = cut if name is None else {name: cut[name]}
    if config.skip_unreadable:
        cut = _skip_unreadable(cut, num_workers, warn=False)
        return Listing.of(cut, cut)
    return Listing.of(parts.named(), cut)


def _source(config: DataConfig, download: bool) -> RawSplits:
    spec = find_dataset(config.dataset)
    module, name = spec.read.split(":")
    read = getattr(importlib.import_module(f"lab.data.{module}"), name)
    return read(config, download) if spec.downloads else read(config)


def _read(config: DataConfig, download: bool = True) -> RawSplits:
    parts = _source(config, download)
    for warning in parts.warnings:
        console.warn(warning)
    return parts


def _split(parts: RawSplits, config: DataConfig, whole: bool = False) -> dict[str, Split]:
    """The splits "train", "test" and, where there is one, "val"; files are not decoded yet.

    Or, of the `whole` data, the split "all".
    """
    from lab.data.splits import stratified_split, subsample
    from lab.data.types import join

    seed = config.split_seed
    if whole:
        return {"all": subsample(join([*parts.named().values()]), config.max_eval_samples, seed)}
    train, val, test = parts.train, parts.val, parts.test
    if test is None:
        train, test = stratified_split(train, config.test_fraction, seed)
    if val is None and config.val_fraction > 0 and len(train.labels):
        train, val = stratified_split(train, config.val_fraction, seed)
    cut = {"train": subsample(train, config.max_train_samples, seed)}
    cut["test"] = subsample(test, config.max_eval_samples, seed)
    if val is not None:
        cut["val"] = subsample(val, config.max_eval_samples, seed)
    return cut


def _check_classes(cut: Mapping[str, Split], config: DataConfig) -> None:
    """Raise `UserError` for a class without training samples; warn of others without any.

    A training split that --max-train-samples shortens is only warned of; one for evaluation that
    --max-eval-samples shortens is left alone.
    """
    for name, split in cut.items():
        counts = split.labels.bincount(minlength=len(split.class_names)).tolist()
        missing = [c for c, count in zip(split.class_names, counts, strict=True) if not count]
        limited = len(split.labels) == (
            config.max_train_samples if name == "train" else config.max_eval_samples
        )
        if not missing or len(missing) == len(counts) or (limited and name != "train"):
            continue
        classes = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" * (len(missing) > 5))
        what = (
            f"the {TITLES[name]} split has no image of class{'es' * (len(missing) > 1)} {classes}"
        )
        if name == "train" and not limited:
            raise UserError(what, "Add images of every class, or remove the class")
        console.warn(
            f"{what}: " + ("--max-train-samples is too small" if limited else "too few images")
        )


def _skip_unreadable(
    cut: Mapping[str, Split], num_workers: int, warn: bool = True
) -> dict[str, Split]:
    """Return the splits without the images that cannot be decoded, and warn of those.

    This comes after the cut, so that all other samples stay in their splits. Raises `UserError` if
    no training image of a class is left.
    """
    import torch

    from lab.data.decode import NUM_NAMED, FileImages

    readable, skipped = {}, []
    for name, split in cut.items():
        if not isinstance(split.images, FileImages):
            raise UserError(
                "--skip-unreadable is for a directory of images",
                "Leave it out, or give --dataset folder",
            )
        unreadable = split.images.unreadable(num_workers)
        skipped += [split.images.paths[i] for i in unreadable]
        is_readable = torch.ones(len(split.labels), dtype=torch.bool)
        is_readable[list(unreadable)] = False
        readable[name] = split.select(is_readable.nonzero().flatten()) if unreadable else split
        empty = sorted({*readable[name].missing_classes()} - {*split.missing_classes()})
        if name == "train" and empty:
            raise UserError(
                f"none of the training images of {', '.join(empty)} can be read",
                "Replace some, or delete the class",
            )
    if skipped and warn:
        images = f"{len(skipped)} image{'s' if len(skipped) > 1 else ''}"
        console.warn(f"left out {images} that cannot be read: {name_some(skipped, NUM_NAMED)}")
    return readable


def _is_worth_caching(cut: Mapping[str, Split]) -> bool:
    """Return whether all splits together have enough images to cache them once decoded."""
    from lab.data import cache

    return sum(len(split.labels) for split in cut.values()) >= cache.FEWEST


def _cached_histogram(cut: dict[str, Split], train: Split, num_workers: int) -> Tensor | None:
    """Return the histogram of training images in files; None where it is not worth caching.

    Where images of the sample cannot be decoded, `UnreadableImages` names those of all splits.
    """
    from torch import Tensor

    from lab.data.decode import FileImages, UnreadableImages
    from lab.data.splits import sample_positions

    files = cut["train"].images
    decoded = train.images if isinstance(train.images, Tensor) else None
    if not isinstance(files, FileImages) or (decoded is not None and not _is_worth_caching(cut)):
        return None
    try:
        return files.histogram(sample_positions(len(files)), num_workers, decoded)
    except UnreadableImages as error:
        reasons = dict(error.reasons)
        for split in cut.values():
            if isinstance(split.images, FileImages):
                unreadable = split.images.unreadable(num_workers)
                reasons |= {split.images.paths[i]: what for i, what in unreadable.items()}
        raise UnreadableImages(reasons) from error


def _ready(
    named: dict[str, Split],
    config: DataConfig,
    memory: float,
    num_workers: int,
    use_cache: bool | None = None,
) -> dict[str, Split]:
    """Return the splits at the image size, and in memory where all of them fit into `memory`.

    `use_cache`: whether to cache decoded images; None: if these splits are worth it.
    """
    from lab.data.decode import UnreadableImages
    from lab.data.splits import in_memory, resize

    for name, split in named.items():
        if len(split.labels) == 0:
            raise UserError(
                f"the {TITLES.get(name, name)} split is empty",
                "Add pictures, or change the fractions",
            )
    named = {name: resize(split, config.image_size) for name, split in named.items()}
    if sum(math.prod(split.images.shape) for split in named.values()) > memory:
        return named
    use_cache = _is_worth_caching(named) if use_cache is None else use_cache
    decoded: dict[str, Split] = {}
    reasons: dict[str, str] = {}
    for name, split in named.items():
        try:
            decoded[name] = in_memory(split, num_workers, use_cache)
        except UnreadableImages as error:  # all splits first, so that one message names all files
            reasons |= error.reasons
    if reasons:
        raise UnreadableImages(reasons)
    return decoded
