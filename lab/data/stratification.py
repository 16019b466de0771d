"""Stratified sampling and splitting, and warnings about the sizes of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lab.data.types import Split
from lab.errors import UserError, name_some

MIN_CLASS_SIZE = 10  # training images of a class, below which a warning is printed
MAX_IMBALANCE = 10  # the largest class divided by the smallest, above which a warning is printed


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
