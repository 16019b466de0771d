"""The splits of a dataset: reading and dividing it, resizing and decoding its images."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lab import console
from lab.data import TITLES, DataConfig, Numbers, cache, find_dataset
from lab.data.fingerprint import fingerprint
from lab.data.images import AugmentedImages, channel_statistics, in_memory, resize
from lab.data.stratification import (
    class_size_warnings,
    stratified_fold,
    stratified_split,
    subsample,
)
from lab.data.transforms import EvalTransform, SampleTransform
from lab.data.types import NUM_NAMED, RawSplits, Split, UnreadableImages
from lab.errors import UserError, name_some

if TYPE_CHECKING:
    from lab.data.checks import Groups


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset at one image size, and how to normalize their pixels.

    The best epoch is selected on `val`: a part of the training data or, if `selection_split` is
    "test", the test split itself.
    """

    train: Split
    val: Split
    test: Split
    mean: Numbers
    std: Numbers
    selection_split: str  # "validation" or "test"
    # Of "train", "test" and, if it is a split of its own, "val"; with --folds, "folds" is that of
    # all images that are divided.
    fingerprints: dict[str, str]
    revision: str = ""  # see `DataConfig`

    def class_counts(self) -> dict[str, list[int]]:
        """Return the number of images of each class in the training, validation and test split."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if self.val is self.test:
            del splits["val"]
        return {TITLES[name]: split.class_counts() for name, split in splits.items()}

    def balance_warnings(self) -> list[str]:
        """Return warnings about unbalanced and small classes of the training split."""
        return class_size_warnings(self.train.class_names, self.train.class_counts())

    @property
    def decoder(self) -> str:
        """Return the result of `describe_decoder`, or "" if the images do not come from files."""
        if self.train.paths is None:
            return ""
        from lab.data.decode import describe_decoder

        return describe_decoder()


def load_splits(
    config: DataConfig,
    memory: float,
    num_workers: int,
    download: bool = True,
    augment: Sequence[str] = (),
    normalization: tuple[Numbers, Numbers] | None = None,
) -> Splits:
    """Return the splits of a dataset, whose samples depend on `config` alone.

    Images are decoded by `num_workers` processes, and resized, if all splits take at most `memory`
    bytes in total; otherwise the loader does that. With `augment`, the names of augmentations of
    single samples, the training images are `AugmentedImages` instead. `normalization` is the mean
    and the standard deviation of pretrained weights, which are used if the dataset has as many
    channels. Raises `UserError` if files are missing and may not be downloaded, are damaged or too
    few.
    """
    raw = read_dataset(config, download)
    duplicates = None
    if raw.train.paths is not None:
        from lab.data.checks import duplicate_warnings, identical_files

        duplicates = identical_files(raw)
        for warning in duplicate_warnings(raw, duplicates):
            console.warn(warning)
    splits = _split(raw, config, duplicates=duplicates)
    if len(splits["train"].class_names) < 2:
        raise UserError(
            f"{config.dataset} has only one class, {splits['train'].class_names[0]}",
            "Add images of the other classes",
        )
    _check_classes(splits, config)
    if config.skip_unreadable:
        splits = _skip_unreadable(splits, config, num_workers)
    sized = _resize_and_decode(splits, config, memory, num_workers, lazy_train=bool(augment))
    spec = find_dataset(config.dataset)
    mean, std = spec.mean, spec.std
    if normalization and len(normalization[0]) == sized["train"].images.shape[1]:
        mean, std = map(tuple, normalization)
    if mean is None or std is None:
        try:
            mean, std = _channel_statistics(sized["train"].images, num_workers)
        except UnreadableImages:
            raise _unreadable_images(splits, num_workers) from None
    if augment:
        transform = SampleTransform(augment, EvalTransform.of(config), mean)
        images: Any = AugmentedImages(splits["train"].images, sized["train"].images, transform)
        sized["train"] = replace(sized["train"], images=images)
    selection_split = "validation" if "val" in sized else "test"
    val = sized.get("val", sized["test"])
    if config.folds:
        whole = {"folds": raw.train}
        if config.skip_unreadable:
            whole = _skip_unreadable(whole, config, num_workers, warn=False)
        splits |= whole
    fingerprints = {name: fingerprint(split) for name, split in splits.items()}
    return Splits(
        sized["train"], val, sized["test"], mean, std, selection_split, fingerprints, raw.revision
    )


def load_split(
    config: DataConfig,
    name: str,
    memory: float,
    num_workers: int,
    raw: RawSplits | None = None,
) -> tuple[Split, str]:
    """Return the split "train", "val", "test" or "all", and its fingerprint.

    "all" consists of all samples of the dataset, or `max_eval_samples` of them. `raw` is the result
    of `read_dataset`, if the dataset has been read already. Raises `UserError` if there is no such
    split.
    """
    splits = _split(raw or read_dataset(config), config, whole=name == "all")
    if name not in splits:
        raise UserError(
            "the dataset has no validation split: the best epoch was selected on the test split",
            "Give --split test",
        )
    use_cache = _is_worth_caching(splits)
    selected = {name: splits[name]}
    if config.skip_unreadable:
        selected = _skip_unreadable(selected, config, num_workers)
    split = _resize_and_decode(selected, config, memory, num_workers, use_cache)[name]
    return split, fingerprint(selected[name])


def load_fingerprints(config: DataConfig, raw: RawSplits, num_workers: int = 1) -> dict[str, str]:
    """Return the fingerprints of the splits "train", "test" and, if there is one, "val".

    `raw` is the result of `read_dataset`.
    """
    splits = _split(raw, config)
    if config.skip_unreadable:
        splits = _skip_unreadable(splits, config, num_workers, warn=False)
    return {name: fingerprint(split) for name, split in splits.items()}


def read_dataset(config: DataConfig, download: bool = True) -> RawSplits:
    """Return the splits as the dataset comes, and print the warnings about its files.

    Raises `UserError` if the dataset is not in `data_dir` and may not be downloaded.
    """
    spec = find_dataset(config.dataset)
    module, name = spec.read.split(":")
    read = getattr(importlib.import_module(f"lab.data.{module}"), name)
    raw = read(config, download) if spec.downloads else read(config)
    for warning in raw.warnings:
        console.warn(warning)
    return raw


def _split(
    raw: RawSplits, config: DataConfig, whole: bool = False, duplicates: Groups | None = None
) -> dict[str, Split]:
    """Return the splits "train", "test" and, if there is one, "val"; files are not decoded.

    With `whole`, return one split "all" of all samples. `duplicates` is the result of
    `checks.identical_files`, if it is known.
    """
    seed = config.split_seed
    if whole:
        return {"all": subsample(raw.joined(), config.max_eval_samples, seed)}
    train, val, test = raw.train, raw.val, raw.test
    same = None
    if train.paths is not None and (config.folds or test is None or val is None):
        from lab.data.checks import identical_files, originals

        same = originals(raw, identical_files(raw) if duplicates is None else duplicates)
    if config.folds:  # the test split that a dataset comes with is not used
        train, test = stratified_fold(train, config.folds, config.fold, seed, same)
    elif test is None:
        train, test = stratified_split(train, config.test_fraction, seed, same)
    if val is None and config.val_fraction > 0 and len(train.labels):
        train, val = stratified_split(train, config.val_fraction, seed, same)
    splits = {"train": subsample(train, config.max_train_samples, seed)}
    splits["test"] = subsample(test, config.max_eval_samples, seed)
    if val is not None:
        splits["val"] = subsample(val, config.max_eval_samples, seed)
    return splits


def _check_classes(splits: Mapping[str, Split], config: DataConfig) -> None:
    """Raise `UserError` if a class has no training samples; warn if another split lacks a class.

    A split that --max-train-samples or --max-eval-samples shortens only causes a warning.
    """
    for name, split in splits.items():
        missing = split.missing_classes()
        if not missing or len(missing) == len(split.class_names):
            continue
        option, limit = "--max-eval-samples", config.max_eval_samples
        if name == "train":
            option, limit = "--max-train-samples", config.max_train_samples
        limited = len(split.labels) == limit
        classes = f"class{'es' * (len(missing) > 1)} {name_some(missing)}"
        what = f"the {TITLES[name]} split has no image of {classes}"
        if name == "train" and not limited:
            raise UserError(what, "Add images of every class, or remove the class")
        console.warn(f"{what}: {f'{option} is too small' if limited else 'too few images'}")


def _skip_unreadable(
    splits: Mapping[str, Split], config: DataConfig, num_workers: int, warn: bool = True
) -> dict[str, Split]:
    """Return the splits without the images that cannot be decoded, and warn about these.

    The dataset is split first, so that all other samples stay in their splits. Raises `UserError`
    if no training image of a class is left.
    """
    from lab.data.decode import FileImages

    readable, skipped = {}, []
    for name, split in splits.items():
        if not isinstance(split.images, FileImages):
            raise UserError(
                "--skip-unreadable is for images in files",
                f"Leave it out: {config.dataset} has no image files",
            )
        unreadable = split.images.unreadable(num_workers)
        skipped += [split.images.paths[i] for i in unreadable]
        is_readable = torch.ones(len(split.labels), dtype=torch.bool)
        is_readable[list(unreadable)] = False
        readable[name] = split.select(is_readable.nonzero().flatten()) if unreadable else split
        emptied = sorted({*readable[name].missing_classes()} - {*split.missing_classes()})
        if name == "train" and emptied:
            raise UserError(
                f"none of the training images of {', '.join(emptied)} can be read",
                "Replace some of them, or delete the class",
            )
    if skipped and warn:
        images = f"{len(skipped)} image{'s' if len(skipped) > 1 else ''}"
        console.warn(f"left out {images} that cannot be read: {name_some(skipped, NUM_NAMED)}")
    return readable


def _channel_statistics(images: Any, num_workers: int) -> Any:
    """Return the result of `channel_statistics`, of files from the cache if it is there."""
    from lab.data.decode import FileImages

    compute = partial(channel_statistics, images, num_workers)
    if not isinstance(images, FileImages):
        return compute()
    key = f"{images.key(images.transform)}-statistics"
    return map(tuple, cache.cached_json(key, compute))


def _is_worth_caching(splits: Mapping[str, Split]) -> bool:
    """Return whether the splits have enough images in total to cache the decoded images."""
    return sum(len(split.labels) for split in splits.values()) >= cache.MIN_IMAGES


def _unreadable_images(splits: Mapping[str, Split], num_workers: int) -> UserError:
    """Return the error that names all images of the splits that cannot be decoded."""
    from lab.data.decode import FileImages

    reasons: dict[str, str] = {}
    for split in splits.values():
        if isinstance(files := split.images, FileImages):
            unreadable = files.unreadable(num_workers)
            reasons |= {files.paths[i]: reason for i, reason in unreadable.items()}
    return UnreadableImages(reasons)


def _resize_and_decode(
    splits: dict[str, Split],
    config: DataConfig,
    memory: float,
    num_workers: int,
    use_cache: bool | None = None,
    lazy_train: bool = False,
) -> dict[str, Split]:
    """Return the splits at the image size, and in memory if all of them fit into `memory` bytes.

    With `lazy_train`, the training split is left to the loader. `use_cache` is whether to cache
    decoded images; None: if there are enough of them.
    """
    for name, split in splits.items():
        if len(split.labels) == 0:
            raise UserError(
                f"the {TITLES.get(name, name)} split is empty",
                "Add images, or change --test-fraction or --val-fraction",
            )
    transform = EvalTransform.of(config)
    sized = {name: resize(split, transform) for name, split in splits.items()}
    decoded: dict[str, Split] = {}
    if lazy_train:
        decoded["train"] = sized.pop("train")
    if sum(math.prod(split.images.shape) for split in sized.values()) > memory:
        return decoded | sized
    use_cache = _is_worth_caching(sized) if use_cache is None else use_cache
    try:
        for name, split in sized.items():
            decoded[name] = in_memory(split, num_workers, use_cache)
    except UnreadableImages:
        raise _unreadable_images(splits, num_workers) from None
    return decoded
