"""Worker processes that read batches ahead, are monitored, and are shut down explicitly.

PyTorch's DataLoader is not used for three reasons: a killed worker raises an exception in the
middle of a training step; a batch that does not fit into shared memory is lost, and the main
process waits for it forever; and workers run until an iterator is garbage-collected. Here, batches
are sent through pipes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
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

BATCHES_PER_WORKER = 2  # read ahead
POLL_SECONDS = 1  # interval of the checks that all workers are alive
TIMEOUT_SECONDS = 300  # per batch
# Forked workers share the memory of this process, and can call any function of it. From Python 3.14
# on, this is no longer the default on Linux.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
EXIT_SECONDS = 5  # for workers to finish their batches when the reader is closed


def choose_num_workers(requested: int) -> int:
    """Return the number of workers of this process; for -1, one per thread, but at most 8."""
    return min(8, torch.get_num_threads()) if requested < 0 else requested


class BatchReader:
    """Calls a function on batches of indices in worker processes, and yields the results in order.

    With 0 workers, the function is called in this process. Use the reader in a `with` statement, or
    call `close`. The workers run until then, or until an iteration is ended early.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], num_workers: int, fallback: str = "--workers 0"
    ):
        """Create a reader. Error messages suggest the option `fallback`, which avoids workers."""
        self.function, self.num_workers, self.fallback = function, num_workers, fallback
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, batches: Iterable[Tensor]) -> Iterator[Any]:
        """Yield `function(indices)` for each of `batches`, int64 tensors.

        Raises `UserError` if the function raises it, or if a worker process is killed or hangs.
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
                self.num_workers, CONTEXT, initializer=_init_worker, initargs=(self.function,)
            )
        pool, complete = self._pool, False
        remaining, pending = iter(batches), deque[Future[Any]]()
        try:
            while True:
                room = BATCHES_PER_WORKER * self.num_workers - len(pending)
                for indices in islice(remaining, room):
                    pending.append(self._submit(pool, indices))
                if not pending:
                    complete = True
                    return
                yield _convert(self._result(pool, pending.popleft()), np.ndarray, torch.from_numpy)
        except BrokenExecutor:
            raise self._worker_error(pool) from None
        finally:
            if not complete and pool is self._pool:
                self.close()

    def _submit(self, pool: ProcessPoolExecutor, indices: Tensor) -> Future[Any]:
        try:
            # A copy: spawning a worker moves tensors of the function to shared memory, and
            # `indices` may be a view of one.
            return pool.submit(_call, indices.numpy().copy())
        except Exception as error:  # starting a worker raises exceptions of several types
            if "pickle" not in str(error):
                raise
            raise UserError(
                f"the dataset cannot be sent to worker processes ({error})",
                "Define its functions and classes at the top level of a module, or give "
                f"{self.fallback}",
            ) from error

    def _result(self, pool: ProcessPoolExecutor, future: Future[Any]) -> Any:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not wait([future], POLL_SECONDS).done:
            # The pool does not detect that a worker was killed while it sent a batch.
            if any(process.exitcode for process in pool._processes.values()):
                raise BrokenExecutor
            if time.monotonic() > deadline:
                raise UserError(
                    f"no batch was read in {TIMEOUT_SECONDS} s",
                    "Check the disk with the images, or decrease --batch-size",
                )
        return future.result()

    def _worker_error(self, pool: ProcessPoolExecutor) -> UserError:
        """Return the error for a worker process that exited unexpectedly, and end the others."""
        processes, code = list(pool._processes.values()), None
        deadline = time.monotonic() + EXIT_SECONDS
        while code is None and time.monotonic() < deadline:  # known only some time after the exit
            time.sleep(0.01)
            code = next((process.exitcode for process in processes if process.exitcode), None)
        _kill(processes, pool._result_queue)
        code = 1 if code is None else code
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        hint = f"The system may be out of memory: decrease --workers, or give {self.fallback}"
        if code == -signal.SIGSEGV:
            hint = f"An image may have crashed its decoder: find it with {self.fallback}"
        return UserError(f"a worker process that reads images died ({how})", hint)

    def close(self) -> None:
        """End the worker processes, if there are any. Reading again starts new ones."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        # Workers that are stopped or blocked in a system call do not exit: kill them later.
        timer = threading.Timer(
            EXIT_SECONDS, _kill, (list(pool._processes.values()), pool._result_queue)
        )
        timer.start()
        pool.shutdown(cancel_futures=True)
        timer.cancel()


def _kill(processes: list[Any], queue: Any) -> None:
    """Kill the workers of a pool that sends its results through `queue`."""
    for process in processes:
        process.kill()
    queue._writer.close()  # otherwise the pool would wait for the rest of an incomplete batch


_function: Callable[[Tensor], Any]  # that this worker process calls


def _call(indices: np.ndarray) -> Any:
    return _convert(_function(torch.from_numpy(indices)), Tensor, Tensor.numpy)


def _convert(batch: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return a batch with `function` applied to it, or to each part of a tuple, if it is a `kind`.

    Tensors are sent as NumPy arrays, because PyTorch sends tensors through shared memory, which is
    small in containers.
    """
    if isinstance(batch, tuple):
        return tuple(_convert(part, kind, function) for part in batch)
    return function(batch) if isinstance(batch, kind) else batch


def _init_worker(function: Callable[[Tensor], Any]) -> None:
    """Set up a worker process.

    It ignores the signals that a terminal, torchrun or Slurm sends to the whole process group,
    because the main process may need more batches before it stops and ends the workers.
    """
    global _function
    _function = function
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process as soon as the main process has ended, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
