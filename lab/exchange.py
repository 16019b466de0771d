"""Gradients averaged in memory that the processes of one host share, instead of over sockets.

On a CPU the sockets of gloo cost as much as a fifth of a step (benchmarks/worlds.py): each byte
goes through the kernel twice, by threads that take the cores from the backward pass.
"""

import mmap
import os
import uuid
from contextlib import ExitStack, suppress

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

ALIGNED = mmap.PAGESIZE // 4  # float32 of a page: a row of the memory begins on one
CHUNK = 2**16  # float32 that are added up at a time, in the processor's cache


def share_gradients(model: nn.Module) -> bool:
    """Whether the processes average `model`'s gradients in shared memory from now on.

    If not, PyTorch does it as ever: where the model is not a DistributedDataParallel of float32
    parameters on a CPU, or has a hook, and where one process could not map the memory, as on
    another host. All processes call it, and get the same answer.
    """
    if not isinstance(model, DistributedDataParallel):
        return False
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters):
        return False
    num_columns = -(-sum(p.numel() for p in parameters) // ALIGNED) * ALIGNED
    memory = _map_together(4 * (dist.get_world_size() + 1) * num_columns)
    if memory is None:
        return False
    model.register_comm_hook(_Exchange(memory), _Exchange.average)
    return True


class _Exchange:
    """The state of DistributedDataParallel's hook: a reduce-scatter, then an all-gather.

    A process writes each bucket of its gradients into its row. Once all have written the last one,
    each adds up its share of the columns, in the order of the processes, whatever the buckets are:
    so that all have the same bits, those of any other run. Once all have, the means are read.

    Two barriers a step are enough. A row is written again only after the second one, and the means
    only after the next step's first, which a process enters when it has read them.
    """

    def __init__(self, memory: mmap.mmap):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        table = torch.frombuffer(memory, dtype=torch.float32).view(self.world_size + 1, -1)
        self.rows, self.means = table[:-1], table[-1]
        self.filled = 0  # columns, by the buckets of this step
        self.waiting: list[tuple[Future[Tensor], Tensor]] = []

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """The bucket's mean over processes; there once the step's last bucket is."""
        if bucket.index() == 0:
            self.filled, self.waiting = 0, []
        gradients, future = bucket.buffer(), Future[Tensor]()
        columns = slice(self.filled, self.filled + len(gradients))
        self.filled = columns.stop
        torch.mul(gradients, 1 / self.world_size, out=self.rows[self.rank, columns])
        self.waiting.append((future, self.means[columns]))
        if bucket.is_last():
            dist.barrier()
            self._add_up()
            dist.barrier()
            for promised, mean in self.waiting:
                promised.set_result(mean)  # which DistributedDataParallel copies
        return future

    def _add_up(self) -> None:
        """Writes this process's share of the means."""
        rows = self.rows[:, : self.filled].tensor_split(self.world_size, dim=1)[self.rank]
        means = self.means[: self.filled].tensor_split(self.world_size)[self.rank]
        for parts, mean in zip(rows.split(CHUNK, dim=1), means.split(CHUNK), strict=True):
            torch.add(parts[0], parts[1], out=mean)
            for part in parts[2:]:
                mean.add_(part)


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
