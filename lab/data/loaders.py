"""Two loaders, one order of samples, one `Batch` (promises P1 and P2).

Accelerate's own sharding of a DataLoader pads the last batch with samples seen before, and what a
batch holds depends on the number of processes; so the project cuts its batches itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config.schema import EVAL_BATCH_SIZE, TrainConfig
from lab.cuda_graph import CUDAGraphRunner
from lab.data.sampler import BatchSlice, ShardedBatchSampler, join_tensors, random_bits
from lab.data.transforms import BatchTransform
from lab.data.types import Batch, Split
from lab.data.workers import BatchReader
from lab.distributed import default_threads, memory_for_data
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import Splits


class ResidentLoader:
    """Batches cut from a split that lies on the device: no workers, no per-sample Python."""

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
        # Of the few kernels that pictures take as they are, a graph is no gain.
        replays = graphs and sampler.seed is not None and transform.augment
        self.read = CUDAGraphRunner(self._read) if replays else self._read

    def _read(self, indices: Tensor, bits: Tensor | None = None) -> Tensor:
        images = self.images.index_select(0, indices)  # indexing's result, in less time
        return self.transform(images, bits)

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """This process's part of each batch of an epoch, from batch `first` on."""
        order = self.sampler.order(epoch).to(self.device)
        bits = _epoch_bits(self.sampler, self.transform, epoch, self.device)
        for batch_slice in self.sampler.slices(first):
            indices = self.sampler.indices(order, batch_slice, self.mixup is not None)
            images = self.read(indices) if bits is None else self.read(indices, bits[indices])
            yield _make_batch(self, images, indices, epoch, batch_slice)

    def close(self) -> None:
        """Do nothing: there are no worker processes, as a streaming loader has."""


class StreamingLoader:
    """Batches read and decoded by worker processes, for pictures larger than the memory.

    The workers hand over uint8; augmentation and normalisation are the resident loader's, on the
    device, so that both loaders give the same samples to the last bit.
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
        self.index_sampler = _IndexSampler(sampler, self.mixup is not None)
        num_values = math.prod(split.images.shape[1:])
        self.reader = BatchReader(
            split.images,
            self.index_sampler,
            num_workers,
            batch_nbytes=sampler.max_local_batch(self.mixup is not None) * num_values,
            prefetch_factor=4,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def close(self) -> None:
        """End the worker processes; another epoch would start new ones."""
        self.reader.close()

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """This process's part of each batch of an epoch, from batch `first` on."""
        self.index_sampler.epoch, self.index_sampler.first = epoch, first
        bits = _epoch_bits(self.sampler, self.transform, epoch, self.device)
        order = self.sampler.order(epoch).to(self.device)
        for batch_slice, images in zip(self.sampler.slices(first), self.reader, strict=True):
            if isinstance(images, UserError):  # no other process reads this picture
                raise UserError(images.what, images.hint, rank_local=True)
            indices = self.sampler.indices(order, batch_slice, self.mixup is not None)
            images = images.to(self.device, non_blocking=True)
            images = self.transform(images, None if bits is None else bits[indices])
            yield _make_batch(self, images, indices, epoch, batch_slice)


Loader = ResidentLoader | StreamingLoader


def _epoch_bits(
    sampler: ShardedBatchSampler, transform: BatchTransform, epoch: int, device: torch.device
) -> Tensor | None:
    if sampler.seed is None or not transform.augment:
        return None
    return random_bits(sampler.seed, epoch, sampler.num_samples, device)


def _make_batch(
    loader: Loader, images: Tensor, indices: Tensor, epoch: int, batch_slice: BatchSlice
) -> Batch:
    """Return the Batch of images [n, C, H, W] and their indices, mixed if the loader mixes."""
    labels, sampler = loader.labels[indices], loader.sampler
    sizes = tuple(map(len, batch_slice.parts))
    if loader.mixup is None or sampler.seed is None:
        return Batch(images, labels, indices, batch_slice.global_batch_size, part_sizes=sizes)
    height, width = images.shape[2:]
    batch_number = batch_slice.start // sampler.batch_size
    mix = loader.mixup.draw(sampler.seed, epoch, batch_number, height, width)
    # Each part that is not empty begins with an image that only its successor is mixed with.
    runs = [size + 1 for size in sizes if size] or [0]
    targets = mix.share * F.one_hot(labels, len(loader.class_names)).float()
    others = (1 - mix.share) * F.one_hot(labels, len(loader.class_names)).float()
    pairs = zip(targets.split(runs), others.split(runs), strict=True)
    return Batch(
        join_tensors([mix(run) for run in images.split(runs)]),
        join_tensors([run[1:] for run in labels.split(runs)]),
        join_tensors([run[1:] for run in indices.split(runs)]),
        batch_slice.global_batch_size,
        join_tensors([own[1:] + other[:-1] for own, other in pairs]),
        sizes,
    )


class _IndexSampler(torch.utils.data.Sampler):
    def __init__(self, sampler: ShardedBatchSampler, mixes: bool):
        self.sampler, self.mixes, self.epoch, self.first = sampler, mixes, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        order = self.sampler.order(self.epoch)
        for batch_slice in self.sampler.slices(self.first):
            yield self.sampler.indices(order, batch_slice, self.mixes)


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader needs to know about this process and its machine."""

    rank: int
    world_size: int
    device: torch.device
    kind: str  # "resident", "streaming", or "auto"
    num_workers: int
    memory: float  # bytes of images that this process may hold
    cuda_graphs: bool = False  # whether to augment by CUDA graphs

    @classmethod
    def create(
        cls, accelerator: Any, kind: str, num_workers: int, cuda_graphs: str = "never"
    ) -> LoaderOptions:
        """Return the options of this process; `num_workers` -1: by the number of cores."""
        device = accelerator.device
        memory = {"resident": math.inf, "streaming": 0.0}.get(kind)
        return cls(
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=device,
            kind=kind,
            num_workers=min(8, default_threads()) if num_workers < 0 else num_workers,
            memory=memory_for_data(device) if memory is None else memory,
            cuda_graphs=cuda_graphs == "auto" and device.type == "cuda",
        )


def eval_batch_size(device: torch.device, image_size: int) -> int:
    """Return the number of images in a batch for evaluation, the same in train.py and evaluate.py.

    On a GPU, which small batches leave idle, as many pixels as 1,000 images of 32 pixels have.
    """
    if device.type != "cuda":
        return EVAL_BATCH_SIZE
    return max(EVAL_BATCH_SIZE, 1000 * 32**2 // image_size**2)


def build_loaders(
    splits: Splits, config: TrainConfig, options: LoaderOptions
) -> tuple[Loader, Loader, Loader]:
    """Return the loaders of the training, validation and test split of a training run.

    The last two are the same loader if the best epoch is selected on the test split.
    """
    options = replace(options, kind=splits.choose_loader(options.kind, options.memory))
    mean, std, device = splits.mean, splits.std, options.device
    augment = BatchTransform(mean, std, config.augmentations, device, config.mixup_alpha)
    train = build_loader(
        splits.train,
        augment,
        options,
        batch_size=config.batch_size,
        seed=config.seed,
        num_parts=config.grad_accum_steps,
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
) -> Loader:
    """Return a loader over `split`; with `seed` None in order, for evaluation.

    A training batch is cut into `num_parts` parts for gradient accumulation. The kind "auto" stands
    for "resident" if the split is in memory and takes at most `options.memory` bytes.

    Raises `UserError` for a training batch with fewer samples than processes.
    """
    rank, world_size, device = options.rank, options.world_size, options.device
    if seed is not None and batch_size < world_size:
        raise UserError(
            f"--batch-size {batch_size} is smaller than the number of processes, {world_size}",
            "It counts the samples of all processes together: give more",
        )
    sampler = ShardedBatchSampler(len(split.labels), batch_size, seed, rank, world_size, num_parts)
    kind = options.kind
    if kind == "auto":
        fits = isinstance(split.images, Tensor) and split.images.nbytes <= options.memory
        kind = "resident" if fits else "streaming"
    if kind == "resident":
        return ResidentLoader(split, sampler, transform, device, options.cuda_graphs)
    # Indexing images in memory is faster than receiving them from a worker process.
    num_workers = 0 if isinstance(split.images, Tensor) else options.num_workers
    return StreamingLoader(split, sampler, transform, device, num_workers)
