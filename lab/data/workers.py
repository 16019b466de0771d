"""Worker processes that read batches: started, watched, and shut down explicitly.

They belong to PyTorch's DataLoader. This module handles what DataLoader does not: a batch that does
not fit into shared memory is lost in a worker, and the main process waits for it forever; a killed
worker raises an exception from a signal handler, in the middle of a training step; and workers live
until the iterator is garbage-collected.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lab import console
from lab.errors import UserError

SHARED_MEMORY = "/dev/shm"  # the directory of shared memory on Linux
POLL_SECONDS = 1  # interval of the checks that all workers are alive
TIMEOUT_SECONDS = 300  # per batch
EXIT_SECONDS = 10  # for a killed worker to exit after its pipe is broken


class BatchReader:
    """Read whole batches of a dataset in worker processes, in the order of a sampler.

    A batch is `dataset[indices]` for `indices` of the sampler: a tensor, or a tuple with tensors.
    If that raises a `UserError`, the error is yielded instead of the batch. `batch_nbytes` is the
    size of the tensors in the largest batch: only as many batches are prefetched as fit into shared
    memory. It is 0 for batches without tensors, which are sent through pipes. With `num_workers` 0,
    batches are read in this process.

    Use it in a `with` statement, or call `close`. Iterating raises `UserError` if a worker process
    is killed, hangs, or has no shared memory.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[Any],
        num_workers: int,
        *,
        batch_nbytes: int,
        prefetch_factor: int = 2,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        options_without_workers: str = "--workers 0",
    ):
        self.dataset, self.sampler, self.num_workers = _Batches(dataset), sampler, num_workers
        self.batch_nbytes, self.prefetch_factor = batch_nbytes, prefetch_factor
        self.persistent_workers, self.pin_memory = persistent_workers, pin_memory
        self.fallback = options_without_workers
        self.hint = (
            "Start the container with more shared memory (docker run --shm-size 2g), or give "
            + self.fallback
        )
        self._loader: DataLoader | None = None
        self._iterator: Any = None  # the iterator of the loader, which owns the worker processes

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches in the order of the sampler."""
        if not self.num_workers:
            yield from self._build_loader(self.sampler)
            return
        iterator, num_read, complete = self._start_workers(), 0, False
        try:
            while True:
                try:
                    batch = self._next_batch(iterator)
                except StopIteration:
                    complete = True
                    return
                except _WorkersTerminatedError:
                    break
                num_read += 1
                yield batch
        finally:
            if not (complete and self.persistent_workers) and iterator is self._iterator:
                self.close()
        # torchrun and Slurm send SIGTERM to the whole process group, workers included. A training
        # run still has to read the batches until the step after which all processes stop.
        yield from self._build_loader(itertools.islice(self.sampler, num_read, None))

    def close(self) -> None:
        """End the worker processes, if any. Iterating again starts new ones."""
        iterator, self._iterator, self._loader = self._iterator, None, None
        if iterator is None:
            return
        iterator._shutdown_workers()  # there is no public method
        for worker in iterator._workers:
            if worker.is_alive():  # stopped, or blocked in a system call
                worker.kill()
                worker.join(POLL_SECONDS)

    def _build_loader(self, sampler: Iterable[Any], **workers: Any) -> DataLoader:
        return DataLoader(
            self.dataset,
            sampler=sampler,
            batch_size=None,  # because the dataset returns whole batches
            collate_fn=_unchanged,  # the default converts arrays to tensors
            generator=torch.Generator(),  # the global one would be advanced
            pin_memory=self.pin_memory,
            **workers,
        )

    def _start_workers(self) -> Any:
        """Return the iterator whose worker processes read this epoch's batches."""
        if self._loader is None:
            num_workers, prefetch_factor = self._fit_shared_memory()
            self._loader = self._build_loader(
                self.sampler,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                persistent_workers=self.persistent_workers,
                worker_init_fn=_init_worker,
                timeout=POLL_SECONDS,
            )
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            self._iterator = iter(self._loader)
        except RuntimeError:  # a persistent worker of the last epoch does not answer
            self.close()
            return self._start_workers()
        if threading.current_thread() is threading.main_thread():
            # If a worker dies, DataLoader's handler would raise in the middle of a step.
            signal.signal(signal.SIGCHLD, handler)
        return self._iterator

    def _fit_shared_memory(self) -> tuple[int, int]:
        """Return the numbers of workers and of batches per worker that fit into shared memory."""
        if not self.batch_nbytes or not os.path.isdir(SHARED_MEMORY):  # macOS, Windows
            return self.num_workers, self.prefetch_factor
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = shutil.disk_usage(SHARED_MEMORY).free // num_processes
        num_batches = free // self.batch_nbytes - 2  # two more may be in use in the main process
        if num_batches < 1:
            needed = 3 * self.batch_nbytes
            raise UserError(
                f"{SHARED_MEMORY} is too small for worker processes: {free / 2**20:.1f} MiB are "
                f"free for each process, and three batches need {needed / 2**20:.1f} MiB",
                self.hint,
                rank_local=True,
            )
        num_workers = min(self.num_workers, num_batches)
        if num_workers < self.num_workers:
            console.warn(
                f"{SHARED_MEMORY} is too small for {self.num_workers} worker processes: only "
                f"{num_workers} are started (increase it with docker run --shm-size 2g)"
            )
        return num_workers, min(self.prefetch_factor, num_batches // num_workers)

    def _next_batch(self, iterator: Any) -> Any:
        """Return the next batch from the workers.

        Raises `UserError`, `StopIteration` at the end, `_WorkersTerminatedError` after a SIGTERM.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                batch = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:
                timed_out = str(error).startswith("DataLoader timed out")
                if not timed_out:  # the pipe of a killed worker may break before the worker exits
                    sentinels = {worker.sentinel: worker for worker in iterator._workers}
                    ready: list[Any] = connection.wait(list(sentinels), EXIT_SECONDS)
                    for sentinel in ready:
                        # The kernel closes the sentinel's pipe before it sets the exit code.
                        sentinels[sentinel].join(EXIT_SECONDS)
                exit_codes = [w.exitcode for w in iterator._workers if w.exitcode is not None]
                if -signal.SIGTERM in exit_codes:
                    raise _WorkersTerminatedError from None
                if exit_codes:
                    raise self._worker_error(exit_codes[0]) from None
                if not timed_out:
                    raise
                if time.monotonic() > deadline:
                    raise UserError(
                        f"no batch was read in {TIMEOUT_SECONDS} s",
                        "Check the disk with the images, or decrease --batch-size",
                        rank_local=True,
                    ) from None
                continue
            if isinstance(batch, _SharedMemoryFull):
                raise UserError(f"{SHARED_MEMORY} is full", self.hint, rank_local=True)
            return batch

    def _worker_error(self, exit_code: int) -> UserError:
        """Return the error for a worker process that exited unexpectedly."""
        how = f"exit code {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name
        hint = f"The system may be out of memory: decrease --workers, or give {self.fallback}"
        if exit_code == -signal.SIGSEGV:
            hint = f"An image may have crashed its decoder: find it with {self.fallback}"
        return UserError(f"a worker process that reads images died ({how})", hint, rank_local=True)


class _WorkersTerminatedError(Exception):
    """Raised if a worker process was ended by SIGTERM."""


class _SharedMemoryFull:
    """Returned instead of a batch that did not fit into shared memory."""


class _Batches(Dataset):
    """A dataset for worker processes: it moves batches to shared memory, and returns errors."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, indices: Any) -> Any:
        try:
            batch = self.dataset[indices]
        except UserError as error:  # DataLoader would turn it into a RuntimeError
            return error
        if get_worker_info() is None:
            return batch
        try:
            # Otherwise the thread that sends the batch would do it, and lose the batch silently.
            for part in batch if isinstance(batch, tuple) else (batch,):
                if isinstance(part, Tensor):
                    part.share_memory_()
        except RuntimeError:
            return _SharedMemoryFull()
        return batch


def _unchanged(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    """Set up a worker process. It ignores Ctrl-C, after which the main process ends it."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the main process may have set a handler
