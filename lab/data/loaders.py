"""Two loaders, one order of samples, one `Batch` (promises P1 and P2).

Accelerate's own sharding of a DataLoader pads the last batch with samples seen before, and what a
batch holds depends on the number of processes; so the project cuts its batches itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lab.cuda_graph import CUDAGraphRunner
from lab.data.sampler import BatchSlice, ShardedBatchSampler, random_bits
from lab.data.transforms import BatchTransform
from lab.data.types import Batch, Split
from lab.data.workers import BatchReader
from lab.errors import UserError


class ResidentLoader:
    """Batches cut from a split that lies on the device: no workers, no per-sample Python."""

    def __init__(
        self,
        split: Split,
        plan: ShardedBatchSampler,
        transform: BatchTransform,
        device: torch.device,
        graphs: bool = False,
    ):
        assert isinstance(split.images, Tensor)
        self.plan, self.transform, self.device = plan, transform, device
        self.class_names = split.class_names
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.mixer = transform.mixer if plan.seed is not None else None
        # Of the few kernels that pictures take as they are, a graph is no gain.
        replays = graphs and plan.seed is not None and transform.augment
        self.read = CUDAGraphRunner(self._read) if replays else self._read

    def _read(self, index: Tensor, bits: Tensor | None = None) -> Tensor:
        images = self.images.index_select(0, index)  # indexing's result, in less time
        return self.transform(images, bits)

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """This process's part of each batch of an epoch, from batch `first` on."""
        order = self.plan.order(epoch).to(self.device)
        bits = _epoch_bits(self.plan, self.transform, epoch, self.device)
        for batch_slice in self.plan.slices(first):
            index = self.plan.indices(order, batch_slice, self.mixer is not None)
            images = self.read(index) if bits is None else self.read(index, bits[index])
            yield _finished(self, images, index, epoch, batch_slice)

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
        plan: ShardedBatchSampler,
        transform: BatchTransform,
        device: torch.device,
        num_workers: int,
    ):
        self.plan, self.transform, self.device = plan, transform, device
        self.class_names = split.class_names
        self.labels = split.labels.to(device)
        self.mixer = transform.mixer if plan.seed is not None else None
        self.sampler = _IndexSampler(plan, self.mixer is not None)
        num_values = math.prod(split.images.shape[1:])
        self.reader = BatchReader(
            split.images,
            self.sampler,
            num_workers,
            batch_nbytes=plan.max_local_batch(self.mixer is not None) * num_values,
            prefetch_factor=4,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def close(self) -> None:
        """End the worker processes; another epoch would start new ones."""
        self.reader.close()

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """This process's part of each batch of an epoch, from batch `first` on."""
        self.sampler.epoch, self.sampler.first = epoch, first
        bits = _epoch_bits(self.plan, self.transform, epoch, self.device)
        order = self.plan.order(epoch).to(self.device)
        for batch_slice, images in zip(self.plan.slices(first), self.reader, strict=True):
            if isinstance(images, UserError):  # no other process reads this picture
                raise UserError(images.what, images.hint, rank_local=True)
            index = self.plan.indices(order, batch_slice, self.mixer is not None)
            images = images.to(self.device, non_blocking=True)
            images = self.transform(images, None if bits is None else bits[index])
            yield _finished(self, images, index, epoch, batch_slice)


Loader = ResidentLoader | StreamingLoader


def _epoch_bits(
    plan: ShardedBatchSampler, transform: BatchTransform, epoch: int, device: torch.device
) -> Tensor | None:
    if plan.seed is None or not transform.augment:
        return None
    return random_bits(plan.seed, epoch, plan.num_samples, device)


def _finished(
    loader: Loader, images: Tensor, index: Tensor, epoch: int, batch_slice: BatchSlice
) -> Batch:
    """The Batch of images [n, C, H, W] and their positions, mixed where the loader mixes."""
    labels, plan = loader.labels[index], loader.plan
    sizes = tuple(map(len, batch_slice.parts))
    if loader.mixer is None or plan.seed is None:
        return Batch(images, labels, index, batch_slice.global_batch_size, part_sizes=sizes)
    height, width = images.shape[2:]
    mix = loader.mixer.draw(plan.seed, epoch, batch_slice.start // plan.batch_size, height, width)
    runs = [size + 1 for size in sizes if size] or [0]  # each begins with a partner alone
    return Batch(
        _join([mix(run) for run in images.split(runs)]),
        _join([run[1:] for run in labels.split(runs)]),
        _join([run[1:] for run in index.split(runs)]),
        batch_slice.global_batch_size,
        _join([run[:-1] for run in labels.split(runs)]),
        mix.share,
        sizes,
    )


def _join(pieces: list[Tensor]) -> Tensor:
    """Return the tensors joined; one alone is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _IndexSampler(torch.utils.data.Sampler):
    def __init__(self, plan: ShardedBatchSampler, mixes: bool):
        self.plan, self.mixes, self.epoch, self.first = plan, mixes, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        order = self.plan.order(self.epoch)
        for batch_slice in self.plan.slices(self.first):
            yield self.plan.indices(order, batch_slice, self.mixes)


def build_loader(
    split: Split,
    transform: BatchTransform,
    *,
    batch_size: int,
    seed: int | None,
    rank: int,
    world_size: int,
    device: torch.device,
    kind: str,
    num_workers: int,
    memory: float,
    graphs: bool = False,
    num_parts: int = 1,
) -> Loader:
    """A loader over `split`; `seed` None: in order, for evaluation.

    `num_parts` is the number of gradient accumulation parts that a training batch is cut into.

    `kind` is "resident", "streaming", or "auto": resident where the split is decoded and takes at
    most `memory` bytes. With `graphs` a resident one augments by CUDA graphs. Raises `UserError`
    for a training batch with fewer samples than processes.
    """
    if seed is not None and batch_size < world_size:
        raise UserError(
            f"--batch-size {batch_size} is smaller than the number of processes, {world_size}",
            "It counts the samples of all processes together: give more",
        )
    plan = ShardedBatchSampler(len(split.labels), batch_size, seed, rank, world_size, num_parts)
    if kind == "auto":
        fits = isinstance(split.images, Tensor) and split.images.nbytes <= memory
        kind = "resident" if fits else "streaming"
    if kind == "resident":
        return ResidentLoader(split, plan, transform, device, graphs)
    # Images in memory are cut faster than they are sent from a worker.
    num_workers = 0 if isinstance(split.images, Tensor) else num_workers
    return StreamingLoader(split, plan, transform, device, num_workers)
