"""Splits: stratified sampling and splitting, resizing, and the mean and std of their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.data.transforms import EvalTransform, SampleTransform
from lab.data.types import Images, LazyImages, Split, select
from lab.errors import UserError, name_some

MIN_CLASS_SIZE = 10  # training images of a class, below which a warning is printed
MAX_IMBALANCE = 10  # the largest class divided by the smallest, above which a warning is printed
SAMPLE_SIZE = 10_000  # images; more would change mean and std by less than 0.001


def stratified_sample(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return the sorted positions, int64 [count], of a random sample that keeps class proportions.

    Each class gets its share rounded down; the remaining samples go to the largest remainders.
    """
    sizes = torch.bincount(labels)
    return _sample(labels, sizes, _shares(sizes, count), seed)


def stratified_split(
    split: Split, fraction: float, seed: int, originals: Mapping[str, str] | None = None
) -> tuple[Split, Split]:
    """Return a split in two, (rest, part): `part` gets `fraction` of the samples of each class.

    Both keep the order, and have at least one sample of every class with two or more samples. The
    only sample of a class stays in the rest. `originals` gives the same path to all files with the
    same content: the samples are split as if only the first of these existed, and the others follow
    it, so that adding a copy moves no other sample.
    """
    first = _first_copies(split, originals)
    distinct = first.unique()
    labels = split.labels[distinct]
    sizes = torch.bincount(labels)
    counts = _shares(sizes, max(1, round(len(distinct) * fraction)))
    counts = torch.minimum(counts.clamp(min=1), sizes - 1).clamp(min=0)
    return _divide(split, first, distinct[_sample(labels, sizes, counts, seed)])


def stratified_fold(
    split: Split,
    num_folds: int,
    fold: int,
    seed: int,
    originals: Mapping[str, str] | None = None,
) -> tuple[Split, Split]:
    """Return a split in two, (rest, part): `part` is number `fold`, from 1, of `num_folds` parts.

    Each sample is in one part. The samples of each class are dealt out in random order, so that the
    sizes of two parts, and their numbers of samples of a class, differ by at most one. Both results
    keep the order. `originals` as in `stratified_split`. Raises `UserError` if a class has only one
    sample, which could not be trained and tested, or if there are fewer samples than parts.
    """
    first = _first_copies(split, originals)
    distinct = first.unique()
    labels = split.labels[distinct]
    sizes = torch.bincount(labels, minlength=len(split.class_names))
    if single := [split.class_names[k] for k in (sizes == 1).nonzero().flatten().tolist()]:
        raise UserError(
            f"cross-validation needs two different images of each class, and there is only one of "
            f"{name_some(single)}",
            "Add images of it, or remove the class",
        )
    if len(distinct) < num_folds:
        raise UserError(
            f"{len(distinct)} images cannot be divided into {num_folds} parts", "Give fewer --folds"
        )
    random = np.random.RandomState(seed)
    order = torch.cat(
        [
            members[random_choice(len(members), len(members), random)]
            for members in labels.argsort(stable=True).split(sizes.tolist())
        ]
    )
    return _divide(split, first, distinct[order[fold - 1 :: num_folds]])


def _first_copies(split: Split, originals: Mapping[str, str] | None) -> Tensor:
    """Return the position of the first sample with the content of each sample, int64 [N]."""
    if not originals or split.paths is None:
        return torch.arange(len(split.labels))
    seen: dict[str, int] = {}
    names = (originals.get(path, path) for path in split.paths)
    return torch.tensor([seen.setdefault(name, i) for i, name in enumerate(names)])


def _divide(split: Split, first: Tensor, chosen: Tensor) -> tuple[Split, Split]:
    """Return the split without and with the samples whose first copies are `chosen`."""
    in_part = torch.zeros(len(split.labels), dtype=torch.bool)
    in_part[chosen] = True
    in_part = in_part[first]
    return split.select((~in_part).nonzero().flatten()), split.select(in_part.nonzero().flatten())


def _shares(sizes: Tensor, count: int) -> Tensor:
    """Return how many of `count` samples each class gets, int64 [K], by the largest remainder."""
    total = int(sizes.sum())
    shares, remainder = sizes * count // total, sizes * count % total
    num_left = count - int(shares.sum())
    shares[remainder.argsort(descending=True, stable=True)[:num_left]] += 1
    return shares


def _sample(labels: Tensor, sizes: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Return the sorted positions of `counts[k]` random samples of each class k."""
    random = np.random.RandomState(seed)
    classes = labels.argsort(stable=True).split(sizes.tolist())
    chosen = [
        members[random_choice(len(members), count, random)]
        for members, count in zip(classes, counts.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values


def random_choice(num_items: int, count: int, random: np.random.RandomState) -> Tensor:
    """Return the first `count` elements of a random permutation of `num_items`, int64 [count].

    This is a Fisher-Yates shuffle with 32-bit outputs of the Mersenne Twister. It gives the result
    of torch.randperm in PyTorch 2.14 for the same seed, with which the published splits were drawn.
    PyTorch may change its algorithm; NumPy guarantees that the stream of RandomState never changes
    (NEP 19), so that no upgrade can move a sample to another split.
    """
    outputs = random.randint(2**32, size=max(0, num_items - 1), dtype=np.uint32)
    offsets = outputs % np.arange(num_items, 1, -1)
    order = list(range(num_items))
    for i, offset in enumerate(offsets[:count].tolist()):
        order[i], order[i + offset] = order[i + offset], order[i]
    return torch.tensor(order[:count], dtype=torch.long)


def subsample(split: Split, count: int, seed: int) -> Split:
    """Return a stratified random sample of at most `count` samples; all if `count` is 0."""
    if count == 0 or count >= len(split.labels):
        return split
    return split.select(stratified_sample(split.labels, count, seed))


def in_memory(split: Split, num_workers: int, use_cache: bool | None = None) -> Split:
    """Return the split with its images in a tensor; `use_cache` as in `FileImages.decode_all`."""
    if isinstance(split.images, Tensor):
        return split
    return replace(split, images=split.images.decode_all(num_workers, use_cache))


@dataclass(frozen=True)
class ResizedImages(LazyImages):
    """Images in memory that are resized when indexed, because all resized images may not fit."""

    images: Tensor  # uint8 [N, C, H, W]
    transform: EvalTransform

    @property
    def shape(self) -> Sequence[int]:
        return (*self.images.shape[:2], self.transform.size, self.transform.size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._resize(self.images[index])

    def select(self, index: Tensor) -> ResizedImages:
        return replace(self, images=self.images[index])

    def join(self, others: Sequence[ResizedImages]) -> ResizedImages:
        """Return the concatenation of several sets of images."""
        return replace(self, images=torch.cat([lazy.images for lazy in (self, *others)]))

    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor:
        """Return all images resized, uint8 [N, C, size, size]."""
        resized = torch.empty(tuple(self.shape), dtype=torch.uint8)

        def resize_part(start: int) -> None:
            part = slice(start, start + 1024)
            resized[part] = self._resize(self.images[part])

        # PyTorch itself resizes uint8 images with three channels in one thread.
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            list(pool.map(resize_part, range(0, len(self.images), 1024)))
        return resized

    def _resize(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return self.transform(images)


def resize(split: Split, transform: EvalTransform) -> Split:
    """Return the split with images that are cropped and resized when indexed."""
    if not isinstance(split.images, Tensor):  # files are decoded to their size
        return split
    size, keeps_all = transform.size, transform.fit != "crop" or transform.crop_pct == 1
    if split.images.shape[-2:] == (size, size) and keeps_all:
        return split
    return replace(split, images=ResizedImages(split.images, transform))


@dataclass(frozen=True)
class AugmentedImages:
    """Images that are augmented at their own size when they are indexed, for training."""

    images: Any  # uint8 [N, C, H, W], or `FileImages`
    eval_images: Images  # as they are evaluated
    transform: SampleTransform

    @property
    def shape(self) -> Sequence[int]:
        return self.eval_images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return images as uint8 [n, C, size, size]: augmented or, for an index [n], as evaluated.

        To be augmented, `index` is int64 [n, 2], the position and the random bits of each sample.
        Raises `UnreadableImages` with all of them that cannot be decoded.
        """
        if index.ndim == 1:
            return self.eval_images[index]
        if not len(index):
            return self.eval_images[index[:, 0]]
        if not isinstance(self.images, Tensor):
            return self.images.augment(index, self.transform)
        return torch.stack([self.transform(self.images[i], bits) for i, bits in index.tolist()])

    def select(self, index: Tensor) -> AugmentedImages:
        images, eval_images = select(self.images, index), select(self.eval_images, index)
        return replace(self, images=images, eval_images=eval_images)


def sample_positions(num_images: int) -> Tensor:
    """Return the positions of the images that mean and std are computed from, int64 [n], sorted.

    These are all images, or `SAMPLE_SIZE` evenly spaced ones.
    """
    # float32 keeps the positions of published results, but cannot represent larger numbers.
    dtype = torch.float32 if num_images <= 2**24 else torch.float64
    return torch.linspace(0, num_images - 1, min(num_images, SAMPLE_SIZE), dtype=dtype).long()


def histogram(images: Tensor) -> Tensor:
    """Return how often each value occurs in each channel of uint8 [N, C, H, W], int64 [C, 256]."""
    in_chans = images.transpose(0, 1).flatten(1)
    return torch.stack([torch.bincount(values, minlength=256) for values in in_chans])


def channel_statistics(
    images: Images, num_workers: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of each channel, for pixels from 0 to 1.

    Images that are not in memory are decoded by `num_workers` processes. Raises
    `UnreadableImages`.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for index in sample_positions(images.shape[0]).split(1000):
        if isinstance(images, Tensor):
            counts += histogram(images[index])
        else:
            counts += histogram(images.select(index).decode_all(num_workers, False))
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


def class_size_warnings(class_names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return the warnings about very different and about small classes of the training split.

    A class without images is left out: that is an error or a warning of its own.
    """
    sizes = {name: count for name, count in zip(class_names, counts, strict=True) if count}
    largest, smallest = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    warnings = []
    if sizes[largest] > MAX_IMBALANCE * sizes[smallest]:
        warnings.append(
            f"the classes are unbalanced: {largest} has {sizes[largest]:,} training images, "
            f"{smallest} has {sizes[smallest]:,} (docs/training.md explains --class-weights and "
            "--balanced-sampling)"
        )
    if small := [name for name, count in sizes.items() if count < MIN_CLASS_SIZE]:
        classes = f"class{'es' * (len(small) > 1)} {name_some(small)}"
        warnings.append(
            f"there are fewer than {MIN_CLASS_SIZE} training images of {classes}: mistakes are "
            "likely, and the metrics uncertain"
        )
    return warnings
