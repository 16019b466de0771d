"""Datasets that are code of the user's: `--dataset FILE.py:FUNCTION`, or passed to `train.main`.

A dataset is a dictionary of the splits "train" and possibly "val" and "test", and possibly
"class_names". A split is a pair of images and labels, or a map-style PyTorch dataset of such pairs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset

from lab.data import DataConfig
from lab.data.cache import stat_files
from lab.data.decode import FileImages, decode, in_workers, pixels, worker_batches
from lab.data.image_folder import SPLIT_OF
from lab.data.transforms import EvalTransform, SampleTransform
from lab.data.types import Images, LazyImages, RawSplits, Split, is_text, normalized
from lab.errors import UserError, name_some
from lab.own_code import DATASETS, PASSED, file_sha256, import_function, raised

CHANNELS = (1, 3)
MAX_CLASSES = 1_000_000  # with integers as labels: more are numbers of something else


def read_own(config: DataConfig, named: bool = True) -> RawSplits:
    """Return the splits of a dataset that is code of the user's.

    The file is imported only if the user named it, not weights or a checkpoint (promise P4). Raises
    `UserError` if its SHA-256 is not `config.revision`, or if its function is missing, raises an
    exception or returns something else.
    """
    name = config.dataset
    if name in PASSED:
        return _convert_splits(PASSED[name], "datasets", config, "")
    if name == DATASETS:
        raise UserError("the dataset was passed to train.main", "Pass it again, or give --dataset")
    if not named:
        raise UserError(
            f"the dataset is {name}, code that runs only if you name it yourself",
            f"If you trust that file, give --dataset {name}",
        )
    sha256 = file_sha256(name)
    if config.revision not in ("", sha256):
        raise UserError(
            f"{name.rpartition(':')[0]} has changed since the training",
            "Give the file as it was in training",
        )
    function = import_function(name)
    try:
        result = function()
    except (Exception, SystemExit) as error:
        raise raised(name, error) from error
    return _convert_splits(result, name, config, sha256)


def _convert_splits(result: Any, name: str, config: DataConfig, revision: str) -> RawSplits:
    """Return what the user's code returned as splits. Raises `UserError` if it is not a dataset."""
    if not isinstance(result, Mapping):
        raise _wrong(name, f"{type(result).__name__}, not a dictionary of splits")
    parts: dict[str, Any] = {}
    for key, part in result.items():
        if split := SPLIT_OF.get(str(key).lower()):
            parts[split] = part
        elif key != "class_names":
            raise _wrong(name, f"the split {key!r}, not train, val, test or class_names")
    if "train" not in parts:
        raise _wrong(name, "no split train")
    classes = getattr(parts["train"], "classes", None)
    given_names = result.get("class_names", classes if isinstance(classes, list | tuple) else None)
    images, labels = {}, {}
    for split, part in parts.items():
        images[split], labels[split] = _convert_split(part, f"{name}, split {split},", config)
    class_names, numbers = _number_classes(labels, given_names, name)
    root, paths = "", [p for i in images.values() if isinstance(i, FileImages) for p in i.paths]
    if paths:
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    splits = {
        split: Split(
            images[split], numbers[split], class_names, getattr(images[split], "paths", None), root
        )
        for split in parts
    }
    kinds = {(type(part), part.shape[1]) for part in images.values()}
    if len(kinds) > 1:
        raise _wrong(name, "splits of different kinds of images, or numbers of channels")
    return RawSplits(splits["train"], splits.get("val"), splits.get("test"), (), revision)


def _convert_split(part: Any, name: str, config: DataConfig) -> tuple[Images, list[Any]]:
    """Return the images of a split, and its labels as the user's code gives them."""
    if isinstance(part, tuple | list) and len(part) == 2:
        images, labels = part[0], _to_list(part[1], name)
        if isinstance(images, Sequence) and images and isinstance(images[0], str | os.PathLike):
            paths = [os.path.abspath(path) for path in images]
            converted: Images = FileImages.create(paths, stat_files(paths), config)
        elif isinstance(images, np.ndarray | Tensor):
            converted = _to_images(images, name)
        else:
            raise _wrong(name, f"images of type {type(images).__name__}, not an array or paths")
        if not isinstance(labels, list) or len(labels) != len(converted):
            raise _wrong(name, f"{len(converted)} images, but labels {np.shape(labels)}")
        if not labels:
            raise _wrong(name, "no samples")
        return converted, labels
    if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
        kind = type(part).__name__
        raise _wrong(name, f"{kind}, not a pair (images, labels) or a map-style dataset")
    if not len(part):
        raise _wrong(name, "no samples")
    positions = torch.arange(len(part))
    lazy = DatasetImages(part, positions, EvalTransform.of(config), 0, name)
    lazy = replace(lazy, num_channels=len(lazy.image(0)))
    targets = None if getattr(part, "target_transform", None) else getattr(part, "targets", None)
    if targets is not None and np.shape(targets) == (len(part),):
        listed = _to_list(targets, name)
        # A subclass may change the labels in `__getitem__` and inherit `targets`.
        some = positions[:: max(1, len(part) // 16)]
        if lazy.labels(some) == [listed[i] for i in some.tolist()]:
            return lazy, listed
    num_workers = torch.get_num_threads()
    batches = worker_batches(len(part), num_workers)
    with in_workers(lazy.labels, batches, num_workers) as results:
        return lazy, [label for batch in results for label in batch]


def _to_list(labels: Any, name: str) -> Any:
    """Return an array, tensor or sequence of labels as a list."""
    labels = labels.cpu() if isinstance(labels, Tensor) else labels
    try:
        return np.asarray(labels).tolist()
    except ValueError:
        raise _wrong(name, "labels of different lengths") from None


def _to_images(images: np.ndarray | Tensor, name: str) -> Tensor:
    """Return uint8 [N, H, W] or [N, H, W, C] as [N, C, H, W]."""
    array = images.numpy(force=True) if isinstance(images, Tensor) else images
    shape = array.shape
    has_images = len(shape) == 3 or (len(shape) == 4 and shape[3] in CHANNELS)
    if array.dtype != np.uint8 or not has_images:
        raise _wrong(
            name,
            f"images {array.dtype} {list(shape)}, not uint8 [N, H, W] or [N, H, W, C] with 1 or 3 "
            "channels",
        )
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.unsqueeze(1) if len(shape) == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def _number_classes(
    labels: Mapping[str, list[Any]], given_names: Any, name: str
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the class names, and the labels int64 [N] of each split. Raises `UserError`."""
    if given_names is not None and not isinstance(given_names, list | tuple | np.ndarray):
        raise _wrong(name, f"class_names of type {type(given_names).__name__}, not a list")
    names = None if given_names is None else [normalized(str(n)) for n in given_names]
    if repeated := sorted(n for n, count in Counter(names or ()).items() if count > 1):
        raise _wrong(name, f"class_names that contain {name_some(repeated)} more than once")
    labels = {
        split: [normalized(label) if isinstance(label, str) else label for label in part]
        for split, part in labels.items()
    }
    kinds = {type(label) for part in labels.values() for label in part}
    if kinds not in ({str}, {int}):
        wrong = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise _wrong(name, f"labels of type {wrong}, not int or str")
    found = {label for part in labels.values() for label in part}
    for text in (*(names or ()), *(found if kinds == {str} else ())):
        if not is_text(text):
            raise _wrong(name, f"the class name {text!a}, which is not UTF-8")
    if kinds == {str}:
        names = names or sorted(found)
        if unknown := sorted(found - set(names)):
            raise _wrong(name, f"labels that are not in class_names: {name_some(unknown)}")
        position = {n: i for i, n in enumerate(names)}
        return tuple(names), {
            split: torch.tensor([position[label] for label in part], dtype=torch.int64)
            for split, part in labels.items()
        }
    if not names and max(found) >= MAX_CLASSES:
        raise _wrong(name, f"the label {max(found)}, but no class_names")
    names = names or [str(i) for i in range(max(found) + 1)]
    if min(found) < 0 or max(found) >= len(names):
        raise _wrong(name, f"labels from {min(found)} to {max(found)} for {len(names)} classes")
    return tuple(names), {split: torch.tensor(part) for split, part in labels.items()}


def _as_scalar(label: Any) -> Any:
    """Return the element of a tensor or an array that has a single one, such as MedMNIST's."""
    array = label.numpy() if isinstance(label, Tensor) else label
    return array.item() if isinstance(array, np.ndarray | np.generic) and array.size == 1 else label


def _wrong(name: str, what: str) -> UserError:
    return UserError(
        f"{name} returned {what}", "docs/extending.md shows what a dataset of your own returns"
    )


@dataclass(frozen=True)
class DatasetImages(LazyImages):
    """Images of a map-style PyTorch dataset, which are read when they are indexed."""

    dataset: Any
    positions: Tensor  # int64 [N], in `dataset`
    transform: EvalTransform
    num_channels: int  # 0: any
    name: str  # for error messages

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.positions), self.num_channels, self.transform.size, self.transform.size)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images at `index`, int64 [n], as uint8 [n, C, size, size]."""
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        for image, i in zip(images, index.tolist(), strict=True):
            image.copy_(self.transform(self.image(i)))
        return images

    def augment(self, index: Tensor, transform: SampleTransform) -> Tensor:
        """Return the images after `transform`; `index` is int64 [n, 2] as in `FileImages`."""
        return torch.stack([transform(self.image(i), bits) for i, bits in index.tolist()])

    def select(self, index: Tensor) -> DatasetImages:
        return replace(self, positions=self.positions[index])

    def join(self, others: Sequence[DatasetImages]) -> DatasetImages:
        """Return the concatenation of several sets of images."""
        sets = (self, *others)
        sizes = torch.tensor([0, *(len(s.dataset) for s in sets)]).cumsum(0).tolist()
        positions = [s.positions + start for s, start in zip(sets, sizes, strict=False)]
        dataset: Any = ConcatDataset([s.dataset for s in sets])
        return replace(self, dataset=dataset, positions=torch.cat(positions))

    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor:
        """Return all images, uint8 [N, C, size, size]. They are not cached."""
        batches = worker_batches(len(self), num_workers)
        images = torch.empty(tuple(self.shape), dtype=torch.uint8)
        with in_workers(self.__getitem__, batches, num_workers) as results:
            for index, batch in zip(batches, results, strict=True):
                images[index[0] : index[-1] + 1] = batch
        return images

    def labels(self, index: Tensor) -> list[Any]:
        """Return the labels at `index`, int64 [n], as the dataset gives them."""
        return [_as_scalar(self._sample(i)[1]) for i in index.tolist()]

    def image(self, i: int) -> Tensor:
        """Return an image at its own size, uint8 [C, H, W]. Raises `UserError`."""
        image, _ = self._sample(i)
        if isinstance(image, str | os.PathLike):
            image = decode(os.fspath(image), self.transform.decode_size)
        elif isinstance(image, Image.Image):
            image = pixels(image)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
            image = image.permute(2, 0, 1) if image.ndim == 3 else image
        if isinstance(image, Tensor) and image.ndim == 2:
            image = image.unsqueeze(0)
        channels = (self.num_channels,) if self.num_channels else CHANNELS
        is_image = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
        if not is_image or len(image) not in channels:
            got = type(image).__name__
            if isinstance(image, Tensor | np.ndarray):
                got = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
            raise UserError(
                f"{self.name} has as an image {got}, not a PIL image, a path, or uint8 [C, H, W] "
                f"or array [H, W, C] with {' or '.join(map(str, channels))} channels",
                "Remove transforms that convert or normalize: lab does that",
            )
        return image

    def _sample(self, i: int) -> tuple[Any, Any]:
        position = int(self.positions[i])
        try:
            sample = self.dataset[position]
        except Exception as error:
            raise raised(f"{self.name} at index {position}", error) from error
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            kind = type(sample).__name__
            raise UserError(
                f"{self.name} has {kind} at index {position}, not a pair (image, label)",
                "docs/extending.md shows what a dataset of your own returns",
            )
        return sample[0], sample[1]
