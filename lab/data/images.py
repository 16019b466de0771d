"""Images that are resized or augmented when they are indexed, and the mean and std of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lab.data.transforms import EvalTransform, SampleTransform
from lab.data.types import Images, LazyImages, Split, select

SAMPLE_SIZE = 10_000  # images; more would change mean and std by less than 0.001


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
