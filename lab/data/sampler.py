"""Random bits, the order of samples, and their distribution over processes (promises P1 and P2).

All of it is a pure function of the seed and the epoch, without a random number generator's state.
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
    """Return 64 random bits for each sample of an epoch, int64 [N], independent for each `stream`.

    They depend on (seed, epoch, sample) alone, and integer arithmetic gives the same result on
    every device: a counter is hashed by the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast
    splittable pseudorandom number generators").
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
    return (x >> bits) & (2 ** (64 - bits) - 1)  # a logical shift; that of int64 copies the sign


def permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch, int64 [N], a function of (seed, epoch) alone.

    Samples are sorted by random bits, because PyTorch may change the algorithm of torch.randperm.
    """
    return random_bits(seed, epoch, num_samples, "cpu", stream=1).argsort(stable=True)


def balanced_permutation(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Return an epoch of N samples in which the classes are equally frequent, int64 [N].

    It is a function of (labels, seed, epoch) alone. Each class is drawn N // K times, K being the
    number of classes that occur in `labels`, int64 [N]; N % K random classes are drawn once more.
    The samples of a class are drawn in one random order after another, so that in an epoch no
    sample is drawn more than once more often than another of its class.
    """
    num_samples = len(labels)
    sizes = labels.bincount()
    by_class = [
        members for members in labels.argsort(stable=True).split(sizes.tolist()) if len(members)
    ]
    counts = torch.full((len(by_class),), num_samples // len(by_class))
    counts[permutation(len(by_class), seed, epoch)[: num_samples % len(by_class)]] += 1
    num_rounds = [-(-count // len(m)) for m, count in zip(by_class, counts.tolist(), strict=True)]
    num_bits = [rounds * len(m) for m, rounds in zip(by_class, num_rounds, strict=True)]
    bits = random_bits(seed, epoch, sum(num_bits), "cpu", stream=2).split(num_bits)
    drawn = [
        m[b.view(-1, len(m)).argsort(stable=True).flatten()[:count]]
        for m, b, count in zip(by_class, bits, counts.tolist(), strict=True)
    ]
    return torch.cat(drawn)[permutation(num_samples, seed, epoch)]


def balanced_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return the weight N / (K n_k) of each class k in the loss, float64 [num_classes].

    N is the number of `labels`, int64 [N], n_k that of class k, and K the number of classes that
    occur: scikit-learn's `compute_class_weight("balanced")`. A class that does not occur gets 0.
    """
    sizes = labels.bincount(minlength=num_classes).double()
    weights = len(labels) / (int((sizes > 0).sum()) * sizes)
    return weights.masked_fill(sizes == 0, 0.0)


def derive_seed(*numbers: int) -> int:
    """Return a seed from several numbers; 32 bits, as PyTorch's CPU generator ignores the rest."""
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), "big")


def shard(num_items: int, rank: int, world_size: int) -> slice:
    """Return a process's contiguous part of `num_items`, without padding.

    The sizes of the parts differ by at most one.
    """
    return slice(-(-num_items * rank // world_size), -(-num_items * (rank + 1) // world_size))


@dataclass(frozen=True)
class BatchSlice:
    """One process's part of a global batch, as positions in the order of an epoch."""

    start: int  # of the global batch
    global_batch_size: int  # number of samples of the batch over all processes
    parts: tuple[range, ...]  # this process's samples of each part for gradient accumulation


@dataclass(frozen=True)
class ShardedBatchSampler:
    """Divides a split into batches, and the batches among the processes.

    In training each batch is divided into parts for gradient accumulation, and each part among the
    processes. Part i consists of the same samples on any number of processes, so that synchronized
    BatchNorm statistics are the same. Every process has the same number of parts, and takes part in
    the same collectives.

    In evaluation (`seed` None) whole batches are distributed, so that a sample is in the same
    batch, and gives identical results, on any number of processes.
    """

    num_samples: int
    batch_size: int  # global
    seed: int | None
    rank: int
    world_size: int
    num_parts: int = 1  # for gradient accumulation; at most the number of samples of a batch
    labels: Tensor | None = None  # int64 [N]; the next two need them
    balanced_sampling: bool = False  # whether classes are drawn equally often in training
    class_weights: Tensor | None = None  # float64 [K], of the loss

    @property
    def num_batches(self) -> int:
        """Return the number of batches of an epoch, in evaluation over all processes."""
        return math.ceil(self.num_samples / self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Return the indices of the split in the order of an epoch, int64 [N]."""
        if self.seed is None:
            return torch.arange(self.num_samples)
        if self.balanced_sampling:
            assert self.labels is not None
            return balanced_permutation(self.labels, self.seed, epoch)
        return permutation(self.num_samples, self.seed, epoch)

    def bits(self, epoch: int, order: Tensor) -> Tensor:
        """Return the random bits that augment each sample of an epoch, int64 [N], in its order.

        They belong to the sample or, with balanced sampling, to its position in the epoch, so that
        a sample that is drawn twice is augmented in two ways.
        """
        assert self.seed is not None
        bits = random_bits(self.seed, epoch, self.num_samples, order.device)
        return bits if self.balanced_sampling else bits[order]

    def batch_class_weights(self, order: Tensor) -> Tensor | None:
        """Return the class weights of each batch of an epoch, float32 [num_batches, K], or None.

        They are scaled so that the weights of the samples of a global batch have a mean of 1. Mixup
        and cutmix keep this mean, as each sample gives away as much of its label as it receives.
        """
        if self.class_weights is None:
            return None
        assert self.labels is not None
        weights = self.class_weights[self.labels[order]]
        means = [batch.mean() for batch in weights.split(self.batch_size)]
        return (self.class_weights / torch.stack(means)[:, None]).float()

    def slices(self, first: int = 0) -> Iterator[BatchSlice]:
        """Yield this process's part of each batch, starting at batch `first`."""
        batches = range(first, self.num_batches)
        if self.seed is None:
            batches = range(self.num_batches)[shard(self.num_batches, self.rank, self.world_size)]
        for b in batches:
            start = b * self.batch_size
            samples = range(start, min(start + self.batch_size, self.num_samples))
            parts: tuple[range, ...] = (samples,)
            if self.seed is not None:
                num_parts = min(self.num_parts, len(samples))
                whole_parts = [samples[shard(len(samples), i, num_parts)] for i in range(num_parts)]
                parts = tuple(p[shard(len(p), self.rank, self.world_size)] for p in whole_parts)
            yield BatchSlice(start, len(samples), parts)

    def take(self, values: Tensor, batch_slice: BatchSlice, mixes: bool) -> Tensor:
        """Return the values of a batch slice's samples, [n], from those of an epoch in its order.

        If they will be mixed, each part that is not empty starts with an extra sample, the partner
        of its first: the preceding sample of the global batch or, for the first sample of the
        batch, the last one.
        """
        pieces = []
        for part in filter(None, batch_slice.parts):
            if mixes:
                is_first = part.start == batch_slice.start
                end = part.start + batch_slice.global_batch_size if is_first else part.start
                pieces.append(values[end - 1 : end])
            pieces.append(values[part.start : part.stop])
        return join_tensors(pieces) if pieces else values[:0]


def join_tensors(pieces: list[Tensor]) -> Tensor:
    """Return the concatenation of tensors; a single tensor is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
