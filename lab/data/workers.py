"""Worker processes that read batches ahead: started, watched, and shut down explicitly.

PyTorch's DataLoader is not used: with it, a killed worker raises an exception in the middle of a
training step, a batch that does not fit into shared memory is lost and waited for forever, and
workers live until an iterator is garbage-collected.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.errors import UserError

BATCHES_PER_WORKER = 2  # read ahead; they are in shared memory
TIMEOUT_SECONDS = 300  # per batch
EXIT_SECONDS = 5  # for workers to finish their batches when they are closed


class BatchReader:
    """Calls a function of indices in worker processes, in order; with 0 workers, in this process.

    Use it in a `with` statement, or call `close`. The workers live until then, unless an epoch is
    left midway.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], num_workers: int, fallback: str = "--workers 0"
    ):
        """`fallback` is the option that avoids workers, for error messages."""
        self.function, self.num_workers, self.fallback = function, num_workers, fallback
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, batches: Iterable[Tensor]) -> Iterator[Any]:
        """Yield `function(indices)` for each of `batches`, int64 tensors.

        Raises the `UserError` of the function, or one if a worker process is killed, hangs, or has
        no shared memory.
        """
        try:
            yield from (
                self._read_ahead(batches) if self.num_workers else map(self.function, batches)
            )
        except UserError as error:
            error.rank_local = True  # no other process reads this batch
            raise

    def _read_ahead(self, batches: Iterable[Tensor]) -> Iterator[Any]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.num_workers, initializer=_init_worker, initargs=(self.function,)
            )
        pool, complete = self._pool, False
        remaining, pending = iter(batches), deque[Future[Any]]()
        try:
            while True:
                room = BATCHES_PER_WORKER * self.num_workers - len(pending)
                for indices in islice(remaining, room):
                    pending.append(pool.submit(_call, indices.numpy()))
                if not pending:
                    complete = True
                    return
                yield self._result(pending.popleft())
        except BrokenExecutor:
            raise self._worker_error(pool) from None
        finally:
            if not complete and pool is self._pool:
                self.close()

    def _result(self, future: Future[Any]) -> Any:
        if not wait([future], TIMEOUT_SECONDS).done:
            raise UserError(
                f"no batch was read in {TIMEOUT_SECONDS} s",
                "Check the disk with the images, or decrease --batch-size",
            )
        try:
            return future.result()
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            raise UserError(
                "shared memory is full",
                "Start the container with more of it (docker run --shm-size 2g), or give "
                + self.fallback,
            ) from error

    def _worker_error(self, pool: ProcessPoolExecutor) -> UserError:
        """Return the error for a worker process that exited unexpectedly."""
        for process in list(pool._processes.values()):
            process.join(0.2)
        code = next((p.exitcode for p in pool._processes.values() if p.exitcode), 1)
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        hint = f"The system may be out of memory: decrease --workers, or give {self.fallback}"
        if code == -signal.SIGSEGV:
            hint = f"An image may have crashed its decoder: find it with {self.fallback}"
        return UserError(f"a worker process that reads images died ({how})", hint)

    def close(self) -> None:
        """End the worker processes, if any. Reading again starts new ones."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + EXIT_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # stopped, or blocked in a system call
                process.kill()
                process.join()


_function: Callable[[Tensor], Any]  # of a worker process


def _call(indices: np.ndarray) -> Any:
    return _function(torch.from_numpy(indices))


def _init_worker(function: Callable[[Tensor], Any]) -> None:
    """Set up a worker process.

    It ignores the signals that a terminal, torchrun or Slurm sends to the whole process group: the
    main process may need more batches before it stops, and ends the workers then.
    """
    global _function
    _function = function
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when the main process has ended, which may have been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
