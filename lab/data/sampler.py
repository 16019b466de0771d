"""Augmentation and normalisation of whole batches on their device, random by sample (promise P2).

How sample i is augmented in epoch e is a function of (seed, e, i) alone. So there is no random
state: one 64-bit hash a sample gives five 12-bit draws, computed with integer arithmetic that is
the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def random_bits(
    seed: int, epoch: int, num_samples: int, device: torch.device | str, stream: int = 0
) -> Tensor:
    """Random bits of every sample of an epoch, int64 [N]; independent ones for each `stream`.

    A counter run through the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators").
    """
    golden = 0x9E3779B97F4A7C15
    start = golden + seed * 0xD1342543DE82EF95 + epoch * 0xDABA0B6EB09322E3
    start = (start + stream * 0xA24BAED4963EE407) % 2**64
    x = torch.arange(num_samples, device=device) * _signed(golden) + _signed(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # logical: int64's own shift copies the sign


def permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, int64 [N]: a function of (seed, epoch) alone.

    Sorted by random bits rather than drawn by torch.randperm, whose algorithm PyTorch may change.
    """
    return random_bits(seed, epoch, num_samples, "cpu", stream=1).argsort(stable=True)


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, in 32 bits: PyTorch's CPU generator ignores the others."""
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), "big")


def shard(num_items: int, rank: int, world_size: int) -> slice:
    """A process's part of `num_items`: consecutive, sizes differing by at most one, none padded."""
    return slice(-(-num_items * rank // world_size), -(-num_items * (rank + 1) // world_size))


@dataclass(frozen=True)
class BatchSlice:
    """One process's part of a global batch, as positions in an epoch's order."""

    start: int  # of the global batch
    global_batch_size: int  # samples of the global batch
    parts: tuple[range, ...]  # of this process, one for each gradient accumulation part


@dataclass(frozen=True)
class ShardedBatchSampler:
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

    def slices(self, first: int = 0) -> Iterator[BatchSlice]:
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
            yield BatchSlice(start, len(samples), parts)

    def max_local_batch(self, mixes: bool) -> int:
        """Return how many images this process reads for a batch at most."""
        num_images = min(self.batch_size, self.num_samples)
        if self.seed is None:
            return num_images
        num_parts = max(1, min(self.num_parts, num_images))
        return num_parts * (-(-num_images // (num_parts * self.world_size)) + mixes)

    def indices(self, order: Tensor, batch_slice: BatchSlice, mixes: bool) -> Tensor:
        """Positions in the split of a cut's samples, int64 [n].

        Where they are to be mixed, one more for each part that is not empty: before its first comes
        the sample that the first is mixed with, which precedes it in the global batch. That of the
        batch's first is the batch's last.
        """
        pieces = []
        for part in filter(None, batch_slice.parts):
            if mixes:
                before = (
                    part.start - 1
                    if part.start > batch_slice.start
                    else batch_slice.start + batch_slice.global_batch_size - 1
                )
                pieces.append(order[before : before + 1])
            pieces.append(order[part.start : part.stop])
        return join_tensors(pieces) if pieces else order[:0]


def join_tensors(pieces: list[Tensor]) -> Tensor:
    """Return the tensors joined; one alone is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
