"""Two loaders, one order of samples, one `Batch` (promises P1 and P2).

Accelerate's own sharding of a DataLoader pads the last batch with samples seen before, and what a
batch holds depends on the number of processes; so the project cuts its batches itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.data.augment import Preprocess, random_bits
from lab.data.sources import Split
from lab.data.workers import BatchReader
from lab.errors import UserError
from lab.graphs import Replayed


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch, on its device. It may be empty."""

    images: Tensor  # float32 [n, C, H, W], normalised
    labels: Tensor  # int64 [n]
    index: Tensor  # int64 [n], positions in the split
    num_global: int  # samples of the batch over all processes
    # Where batches are mixed: the labels of the samples mixed in, int64 [n], and the share of each
    # sample's own.
    partners: Tensor | None = None
    share: float | Tensor = 1.0
    # Samples of each gradient accumulation part, in order; some may be 0. Empty: not cut by a Plan.
    part_sizes: tuple[int, ...] = ()


def permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, int64 [N]: a function of (seed, epoch) alone.

    Sorted by random bits rather than drawn by torch.randperm, whose algorithm PyTorch may change.
    """
    return random_bits(seed, epoch, num_samples, "cpu", stream=1).argsort(stable=True)


def fold(*numbers: int) -> int:
    """One seed from several numbers, in 32 bits: PyTorch's CPU generator ignores the others."""
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), "big")


def shard(num_items: int, rank: int, world_size: int) -> slice:
    """A process's part of `num_items`: consecutive, sizes differing by at most one, none padded."""
    return slice(-(-num_items * rank // world_size), -(-num_items * (rank + 1) // world_size))


@dataclass(frozen=True)
class Cut:
    """One process's part of a global batch, as positions in an epoch's order."""

    start: int  # of the global batch
    num_global: int  # samples of the global batch
    parts: tuple[range, ...]  # of this process, one for each gradient accumulation part


@dataclass(frozen=True)
class Plan:
    """Which samples are in which batch, and which of them are this process's.

    In training each batch is cut into parts for gradient accumulation, and each part among the
    processes: part i, of all processes together, is the same samples on any number of them. So
    BatchNorm statistics that are synchronised are the same, too, and every process has the same
    number of parts, and takes part in the same collectives.

    In evaluation (`seed` None) whole batches are dealt out, so that a sample shares its batch with
    the same others, and gives the same bits, on any number of processes.
    """

    num_samples: int
    batch_size: int  # global
    seed: int | None
    rank: int
    world_size: int
    num_parts: int = 1  # for gradient accumulation; fewer for a batch with fewer samples

    @property
    def num_batches(self) -> int:
        """Batches of an epoch; in evaluation, of all processes together."""
        return math.ceil(self.num_samples / self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Positions in the split in the order of this epoch, int64 [N]."""
        if self.seed is None:
            return torch.arange(self.num_samples)
        return permutation(self.num_samples, self.seed, epoch)

    def cuts(self, first: int = 0) -> Iterator[Cut]:
        """This process's part of each batch, from batch `first` on."""
        batches = range(first, self.num_batches)
        if self.seed is None:
            batches = range(self.num_batches)[shard(self.num_batches, self.rank, self.world_size)]
        for b in batches:
            start = b * self.batch_size
            samples = range(start, min(start + self.batch_size, self.num_samples))
            parts: tuple[range, ...] = (samples,)
            if self.seed is not None:
                num_parts = min(self.num_parts, len(samples))
                wholes = [samples[shard(len(samples), i, num_parts)] for i in range(num_parts)]
                parts = tuple(w[shard(len(w), self.rank, self.world_size)] for w in wholes)
            yield Cut(start, len(samples), parts)

    def max_local_batch(self, mixes: bool) -> int:
        """Return how many images this process reads for a batch at most."""
        num_images = min(self.batch_size, self.num_samples)
        if self.seed is None:
            return num_images
        num_parts = max(1, min(self.num_parts, num_images))
        return num_parts * (-(-num_images // (num_parts * self.world_size)) + mixes)

    def positions(self, order: Tensor, cut: Cut, mixes: bool) -> Tensor:
        """Positions in the split of a cut's samples, int64 [n].

        Where they are to be mixed, one more for each part that is not empty: before its first comes
        the sample that the first is mixed with, which precedes it in the global batch. That of the
        batch's first is the batch's last.
        """
        pieces = []
        for part in filter(None, cut.parts):
            if mixes:
                before = (
                    part.start - 1 if part.start > cut.start else cut.start + cut.num_global - 1
                )
                pieces.append(order[before : before + 1])
            pieces.append(order[part.start : part.stop])
        return _join(pieces) if pieces else order[:0]


class ResidentLoader:
    """Batches cut from a split that lies on the device: no workers, no per-sample Python."""

    def __init__(
        self,
        split: Split,
        plan: Plan,
        preprocess: Preprocess,
        device: torch.device,
        graphs: bool = False,
    ):
        assert isinstance(split.images, Tensor)
        self.plan, self.preprocess, self.device = plan, preprocess, device
        self.class_names = split.class_names
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.mixer = preprocess.mixer if plan.seed is not None else None
        # Of the few kernels that pictures take as they are, a graph is no gain.
        replays = graphs and plan.seed is not None and preprocess.augment
        self.cut = Replayed(self._cut) if replays else self._cut

    def _cut(self, index: Tensor, bits: Tensor | None = None) -> Tensor:
        images = self.images.index_select(0, index)  # indexing's result, in less time
        return self.preprocess(images, bits)

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """This process's part of each batch of an epoch, from batch `first` on."""
        order = self.plan.order(epoch).to(self.device)
        bits = _epoch_bits(self.plan, self.preprocess, epoch, self.device)
        for cut in self.plan.cuts(first):
            index = self.plan.positions(order, cut, self.mixer is not None)
            images = self.cut(index) if bits is None else self.cut(index, bits[index])
            yield _finished(self, images, index, epoch, cut)

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
        plan: Plan,
        preprocess: Preprocess,
        device: torch.device,
        num_workers: int,
    ):
        self.plan, self.preprocess, self.device = plan, preprocess, device
        self.class_names = split.class_names
        self.labels = split.labels.to(device)
        self.mixer = preprocess.mixer if plan.seed is not None else None
        self.sampler = _BatchSampler(plan, self.mixer is not None)
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
        bits = _epoch_bits(self.plan, self.preprocess, epoch, self.device)
        order = self.plan.order(epoch).to(self.device)
        for cut, images in zip(self.plan.cuts(first), self.reader, strict=True):
            if isinstance(images, UserError):  # no other process reads this picture
                raise UserError(images.what, images.hint, lone=True)
            index = self.plan.positions(order, cut, self.mixer is not None)
            images = images.to(self.device, non_blocking=True)
            images = self.preprocess(images, None if bits is None else bits[index])
            yield _finished(self, images, index, epoch, cut)


Loader = ResidentLoader | StreamingLoader


def _epoch_bits(
    plan: Plan, preprocess: Preprocess, epoch: int, device: torch.device
) -> Tensor | None:
    if plan.seed is None or not preprocess.augment:
        return None
    return random_bits(plan.seed, epoch, plan.num_samples, device)


def _finished(loader: Loader, images: Tensor, index: Tensor, epoch: int, cut: Cut) -> Batch:
    """The Batch of images [n, C, H, W] and their positions, mixed where the loader mixes."""
    labels, plan = loader.labels[index], loader.plan
    sizes = tuple(map(len, cut.parts))
    if loader.mixer is None or plan.seed is None:
        return Batch(images, labels, index, cut.num_global, part_sizes=sizes)
    height, width = images.shape[2:]
    mix = loader.mixer.draw(plan.seed, epoch, cut.start // plan.batch_size, height, width)
    runs = [size + 1 for size in sizes if size] or [0]  # each begins with a partner alone
    return Batch(
        _join([mix(run) for run in images.split(runs)]),
        _join([run[1:] for run in labels.split(runs)]),
        _join([run[1:] for run in index.split(runs)]),
        cut.num_global,
        _join([run[:-1] for run in labels.split(runs)]),
        mix.share,
        sizes,
    )


def _join(pieces: list[Tensor]) -> Tensor:
    """Return the tensors joined; one alone is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _BatchSampler(torch.utils.data.Sampler):
    def __init__(self, plan: Plan, mixes: bool):
        self.plan, self.mixes, self.epoch, self.first = plan, mixes, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        order = self.plan.order(self.epoch)
        for cut in self.plan.cuts(self.first):
            yield self.plan.positions(order, cut, self.mixes)


def build_loader(
    split: Split,
    preprocess: Preprocess,
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
    plan = Plan(len(split.labels), batch_size, seed, rank, world_size, num_parts)
    if kind == "auto":
        fits = isinstance(split.images, Tensor) and split.images.nbytes <= memory
        kind = "resident" if fits else "streaming"
    if kind == "resident":
        return ResidentLoader(split, plan, preprocess, device, graphs)
    # Images in memory are cut faster than they are sent from a worker.
    num_workers = 0 if isinstance(split.images, Tensor) else num_workers
    return StreamingLoader(split, plan, preprocess, device, num_workers)
