"""The resident and the streaming loader, which yield the same batches (promises P1 and P2).

Accelerate's sharding of a DataLoader is not used: it pads the last batch with repeated samples, and
the samples of a batch depend on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config.schema import EVAL_BATCH_SIZE, TrainConfig
from lab.cuda_graph import CUDAGraphRunner
from lab.data.images import AugmentedImages
from lab.data.sampler import (
    BatchSlice,
    ShardedBatchSampler,
    balanced_class_weights,
    join_tensors,
)
from lab.data.splits import Splits
from lab.data.transforms import BatchTransform
from lab.data.types import Batch, Images, Split
from lab.data.workers import BatchReader, choose_num_workers
from lab.distributed import memory_for_data
from lab.errors import UserError


class ResidentLoader:
    """Loads batches from a split on the device, without workers or per-sample Python."""

    description = "resident"

    def __init__(
        self,
        split: Split,
        sampler: ShardedBatchSampler,
        transform: BatchTransform,
        device: torch.device,
        graphs: bool = False,
    ):
        assert isinstance(split.images, Tensor)
        self.sampler, self.transform, self.device = sampler, transform, device
        self.class_names = split.class_names
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.mixup = transform.mixup if sampler.seed is not None else None
        # Without augmentation there are too few kernels for a graph to be faster.
        use_graphs = graphs and sampler.seed is not None and transform.augment
        self.graph_runner = CUDAGraphRunner(self._read) if use_graphs else None

    def _read(self, indices: Tensor, bits: Tensor | None = None) -> Tensor:
        images = self.images.index_select(0, indices)  # faster than indexing
        return self.transform(images, bits)

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """Yield this process's part of each batch of an epoch, starting at batch `first`."""
        order, bits, weights = _draw_epoch(self, epoch)
        mixes, read = self.mixup is not None, self.graph_runner or self._read
        for batch_slice in self.sampler.slices(first):
            indices = self.sampler.take(order, batch_slice, mixes)
            if bits is None:
                images = read(indices)
            else:
                images = read(indices, self.sampler.take(bits, batch_slice, mixes))
            yield _make_batch(self, images, indices, epoch, batch_slice, weights)

    def close(self) -> None:
        """Do nothing: unlike the streaming loader, this one has no worker processes."""


class StreamingLoader:
    """Loads batches that worker processes read and decode, for splits larger than the memory.

    The workers return uint8; images are augmented and normalized on the device as in the resident
    loader, so that both loaders yield identical batches. `AugmentedImages` are first augmented by
    the workers, with seeds that do not depend on their number.
    """

    def __init__(
        self,
        split: Split,
        sampler: ShardedBatchSampler,
        transform: BatchTransform,
        device: torch.device,
        num_workers: int,
    ):
        self.sampler, self.transform, self.device = sampler, transform, device
        self.class_names = split.class_names
        self.labels = split.labels.to(device)
        self.mixup = transform.mixup if sampler.seed is not None else None
        self.description = f"streaming, {num_workers} workers for each process"
        self.augments = isinstance(split.images, AugmentedImages) and sampler.seed is not None
        self.reader = BatchReader(split.images.__getitem__, num_workers)

    def close(self) -> None:
        """End the worker processes; the next epoch starts new ones."""
        self.reader.close()

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """Yield this process's part of each batch of an epoch, starting at batch `first`."""
        order, bits, weights = _draw_epoch(self, epoch)
        mixes, slices = self.mixup is not None, partial(self.sampler.slices, first)
        items = order.cpu()
        if self.augments:  # workers need the random bits of each sample, too
            items = torch.stack((items, self.sampler.bits(epoch, items)), 1)
        batches = self.reader.read(self.sampler.take(items, s, mixes) for s in slices())
        for batch_slice, images in zip(slices(), batches, strict=True):
            indices = self.sampler.take(order, batch_slice, mixes)
            if self.device.type == "cuda":  # a copy from pageable memory would wait for the GPU
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
            batch_bits = None if bits is None else self.sampler.take(bits, batch_slice, mixes)
            images = self.transform(images, batch_bits)
            yield _make_batch(self, images, indices, epoch, batch_slice, weights)


Loader = ResidentLoader | StreamingLoader


def _draw_epoch(loader: Loader, epoch: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (order, random bits in that order, class weights of each batch), on the device."""
    sampler, order = loader.sampler, loader.sampler.order(epoch)
    weights, order = sampler.batch_class_weights(order), order.to(loader.device)
    augments = sampler.seed is not None and loader.transform.augment
    return (
        order,
        sampler.bits(epoch, order) if augments else None,
        None if weights is None else weights.to(loader.device),
    )


def _make_batch(
    loader: Loader,
    images: Tensor,
    indices: Tensor,
    epoch: int,
    batch_slice: BatchSlice,
    class_weights: Tensor | None,
) -> Batch:
    """Return the batch of images [n, C, H, W] and their indices, mixed by the loader's mixup.

    `class_weights` are those of each batch of the epoch, float32 [num_batches, K].
    """
    labels, sampler = loader.labels[indices], loader.sampler
    sizes = tuple(map(len, batch_slice.parts))
    size, batch_number = batch_slice.global_batch_size, batch_slice.start // sampler.batch_size
    weights = None if class_weights is None else class_weights[batch_number]
    if loader.mixup is None or sampler.seed is None:
        return Batch(images, labels, indices, size, part_sizes=sizes, class_weights=weights)
    height, width = images.shape[2:]
    mix = loader.mixup.draw(sampler.seed, epoch, batch_number, height, width)
    # Each part that is not empty starts with an extra image, the partner of the next one.
    num_images = [size + 1 for size in sizes if size] or [0]
    one_hot = F.one_hot(labels, len(loader.class_names)).float()
    return Batch(
        join_tensors([mix(part) for part in images.split(num_images)]),
        join_tensors([part[1:] for part in labels.split(num_images)]),
        join_tensors([part[1:] for part in indices.split(num_images)]),
        size,
        join_tensors(
            [
                mix.ratio * part[1:] + (1 - mix.ratio) * part[:-1]
                for part in one_hot.split(num_images)
            ]
        ),
        sizes,
        weights,
    )


@dataclass(frozen=True)
class LoaderOptions:
    """The settings of a loader that depend on this process and its machine."""

    rank: int
    world_size: int
    device: torch.device
    kind: str  # "resident", "streaming", or "auto"
    num_workers: int
    memory: float  # bytes of images that this process may keep
    cuda_graphs: bool = False  # whether to augment by CUDA graphs

    @classmethod
    def create(
        cls, accelerator: Any, kind: str, num_workers: int, cuda_graphs: str = "never"
    ) -> LoaderOptions:
        """Return the options of this process; see `choose_num_workers`."""
        device = accelerator.device
        memory = {"resident": math.inf, "streaming": 0.0}.get(kind)
        return cls(
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=device,
            kind=kind,
            num_workers=choose_num_workers(num_workers),
            memory=memory_for_data(device) if memory is None else memory,
            cuda_graphs=cuda_graphs == "auto" and device.type == "cuda",
        )


def eval_batch_size(device: torch.device, image_size: int) -> int:
    """Return the default batch size for evaluation, the same in train.py and evaluate.py.

    Small batches leave a GPU idle: there a batch has as many pixels as 1,000 images of 32 x 32.
    """
    if device.type != "cuda":
        return EVAL_BATCH_SIZE
    return max(EVAL_BATCH_SIZE, 1000 * 32**2 // image_size**2)


def choose_kind(kind: str, all_images: Sequence[Images], memory: float) -> str:
    """Return the kind of loader to use: "resident" or "streaming".

    `kind` "auto" is "resident" if all images are in memory and take at most `memory` bytes in
    total.
    """
    if kind != "auto":
        return kind
    distinct = {id(images): images for images in all_images}.values()
    in_memory = all(isinstance(images, Tensor) for images in distinct)
    fits = sum(math.prod(images.shape) for images in distinct) <= memory
    return "resident" if in_memory and fits else "streaming"


def build_loaders(
    splits: Splits, config: TrainConfig, options: LoaderOptions
) -> tuple[Loader, Loader, Loader]:
    """Return the loaders of the training, validation and test split of a training run.

    The last two are the same loader if the best epoch is selected on the test split.
    """
    all_images = [split.images for split in (splits.train, splits.val, splits.test)]
    kept = [images for images in all_images if not isinstance(images, AugmentedImages)]
    options = replace(options, kind=choose_kind(options.kind, kept, options.memory))
    mean, std, device = splits.mean, splits.std, options.device
    augment = BatchTransform(mean, std, config.augmentations, device, config.mixup_alpha)
    train = build_loader(
        splits.train,
        augment,
        options,
        batch_size=config.batch_size,
        seed=config.seed,
        num_parts=config.grad_accum_steps,
        balanced_sampling=config.balanced_sampling,
        class_weights=config.class_weights,
    )
    normalize = BatchTransform(mean, std, (), device)
    size = eval_batch_size(device, config.image_size)
    val = build_loader(splits.val, normalize, options, batch_size=size, seed=None)
    if splits.test is splits.val:
        return train, val, val
    return train, val, build_loader(splits.test, normalize, options, batch_size=size, seed=None)


def build_loader(
    split: Split,
    transform: BatchTransform,
    options: LoaderOptions,
    *,
    batch_size: int,
    seed: int | None,
    num_parts: int = 1,
    balanced_sampling: bool = False,
    class_weights: str = "none",
) -> Loader:
    """Return a loader over `split`, which is shuffled in training and in order if `seed` is None.

    Training batches are divided into `num_parts` parts for gradient accumulation.
    `balanced_sampling` and `class_weights` are settings of `TrainConfig`.

    Raises `UserError` if a training batch has fewer samples than there are processes.
    """
    rank, world_size, device = options.rank, options.world_size, options.device
    if seed is not None and batch_size < world_size:
        raise UserError(
            f"--batch-size {batch_size} is smaller than the number of processes, {world_size}",
            "Increase it: it is the number of samples over all processes",
        )
    weights = None
    if class_weights == "balanced":
        weights = balanced_class_weights(split.labels, len(split.class_names))
    sampler = ShardedBatchSampler(
        len(split.labels), batch_size, seed, rank, world_size, num_parts,
        split.labels, balanced_sampling, weights,
    )  # fmt: skip
    kind = choose_kind(options.kind, [split.images], options.memory)
    if kind == "resident" and not isinstance(split.images, AugmentedImages):
        return ResidentLoader(split, sampler, transform, device, options.cuda_graphs)
    # Indexing images in memory is faster than receiving them from a worker process.
    num_workers = 0 if isinstance(split.images, Tensor) else options.num_workers
    return StreamingLoader(split, sampler, transform, device, num_workers)
