"""Gradients averaged in memory that the processes of one host share, instead of over sockets.

The bytes that gloo sends to itself cost the cores that compute: AlexNet's two processes ran at 0.77
of the speed of one, and at 1.05 without any exchange (benchmarks/RESULTS.md).
"""

import mmap
import os
import uuid
from contextlib import ExitStack, suppress
from itertools import pairwise

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

ALIGNED = mmap.PAGESIZE // 4  # float32 of a page: a row of the memory begins on one
CHUNK = 2**18  # float32 that are added up at a time, in the processor's cache
SMALL = 2**18  # gradients that gloo's few messages carry as fast as two barriers do: LeNet-5's


def share_gradients(model: nn.Module) -> bool:
    """Whether the processes average `model`'s gradients in shared memory from now on.

    If not, PyTorch does it as ever: where the model is not a DistributedDataParallel of float32
    parameters on a CPU, or has few of them, where a process is alone, and where one could not map
    the memory, as on another host. All processes call it, and get the same answer.
    """
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size() == 1:
        return False
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters):
        return False
    num_gradients = sum(p.numel() for p in parameters)
    if num_gradients < SMALL:
        return False
    memory = _map_together(4 * dist.get_world_size() * -(-num_gradients // ALIGNED) * ALIGNED)
    if memory is None:
        return False
    model.register_comm_hook(_Exchange(memory, num_gradients), _Exchange.average)
    return True


class _Exchange:
    """The state of DistributedDataParallel's hook: a reduce-scatter, then an all-gather.

    The gradients of a step are columns, of which each process owns a share, and has a row. It
    writes its gradients there for the other owners; once all have written all, it adds up its own
    columns in the order of the processes, whoever owns them, so that neither the buckets nor the
    owner change a bit, and leaves the means in its row; once all have, it reads the others'.

    Two barriers a step are enough. What one process writes for another is written again only after
    the second, when it has been read; a mean only after the next first, which a process enters
    when it has read them all.
    """

    def __init__(self, memory: mmap.mmap, num_columns: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.rows = torch.frombuffer(memory, dtype=torch.float32).view(self.world_size, -1)
        self.bounds = [num_columns * i // self.world_size for i in range(self.world_size + 1)]
        self._begin()

    def _begin(self) -> None:
        self.num_columns = 0  # of the step's buckets so far
        self.pieces: list[tuple[int, Tensor, slice]] = []  # owner, part of a bucket, its columns
        self.buckets: list[tuple[Future[Tensor], Tensor]] = []

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """The bucket with the mean over processes; there once the step's last bucket is."""
        if bucket.index() == 0:
            self._begin()
        gradients, first = bucket.buffer(), self.num_columns
        self.num_columns += len(gradients)
        for owner, (start, stop) in enumerate(pairwise(self.bounds)):
            columns = slice(max(start, first), min(stop, self.num_columns))
            if columns.start < columns.stop:
                piece = gradients[columns.start - first : columns.stop - first]
                self.pieces.append((owner, piece, columns))
                if owner != self.rank:
                    self.rows[self.rank, columns].copy_(piece)
        future: Future[Tensor] = Future()
        self.buckets.append((future, gradients))
        if bucket.is_last():
            dist.barrier()
            self._add_up()
            dist.barrier()
            for owner, piece, columns in self.pieces:
                if owner != self.rank:
                    piece.copy_(self.rows[owner, columns])
            for promised, mean in self.buckets:
                promised.set_result(mean)
        return future

    def _add_up(self) -> None:
        for owner, piece, columns in self.pieces:
            if owner != self.rank:
                continue
            for own, parts in zip(
                piece.split(CHUNK), self.rows[:, columns].split(CHUNK, dim=1), strict=True
            ):
                mean = parts[self.rank]
                summands = [own if i == self.rank else part for i, part in enumerate(parts)]
                torch.add(summands[0], summands[1], out=mean)
                for summand in summands[2:]:
                    mean.add_(summand)
                own.copy_(mean.mul_(1 / self.world_size))


def _map_together(num_bytes: int) -> mmap.mmap | None:
    """Memory that all processes have mapped; None, on all of them, where one could not.

    It belongs to no folder (/dev/shm is small in containers) and is gone with the last process.
    """
    memory, offer = None, [("", "")]
    with ExitStack() as until_all_have_it:
        if dist.get_rank() == 0:
            with suppress(OSError):
                name = f"lab-{uuid.uuid4().hex}"
                file = _reserve(name, num_bytes)
                until_all_have_it.callback(os.close, file)
                offer = [(f"/proc/{os.getpid()}/fd/{file}", f"/memfd:{name} (deleted)")]
        dist.broadcast_object_list(offer)
        with suppress(OSError):
            memory = _map(*offer[0], num_bytes)
        mapped = torch.tensor(memory is not None, dtype=torch.int32)
        dist.all_reduce(mapped, dist.ReduceOp.MIN)
    return memory if mapped else None


def _reserve(name: str, num_bytes: int) -> int:
    """The descriptor of a file in memory, all of which is there: it cannot be missing later.

    Raises `OSError`.
    """
    if not hasattr(os, "memfd_create") or num_bytes > psutil.virtual_memory().available / 2:
        raise OSError("no memory to share")
    file = os.memfd_create(name)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError:
        os.close(file)
        raise
    return file


def _map(path: str, target: str, num_bytes: int) -> mmap.mmap:
    """The file that a process of this host holds open; raises `OSError`.

    On another host, or in another container, `path` is something else: the name tells.
    """
    if os.readlink(path) != target:
        raise OSError("another process's file")
    file = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(file, num_bytes)
    finally:
        os.close(file)
