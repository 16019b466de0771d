"""Signals and the time limit, which stop training after a step that all processes agree on."""

import enum
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed

from lab import console

REPEAT_SECONDS = 1.0  # a signal that is sent to a process and to its group counts once


class StopReason(enum.IntEnum):
    """Why a run stops before its end. If processes have different reasons, the largest counts."""

    TIME_LIMIT = 1
    SIGUSR1 = 2  # Slurm's warning before the end of a job
    SIGTERM = 3
    SIGINT = 4

    @property
    def description(self) -> str:
        """The reason in words."""
        return {1: "--max-hours has passed", 4: "Ctrl-C"}.get(self, self.name)

    @property
    def exit_code(self) -> int:
        """The exit code of train.py: 0 for the time limit, 130 for Ctrl-C, else 143."""
        return {1: 0, 4: 130}.get(self, 143)


SIGNALS = {
    getattr(signal, reason.name): reason for reason in StopReason if hasattr(signal, reason.name)
}


class InterruptHandler:
    """Record signals instead of ending the process, so that training stops between two steps.

    It is a context manager. A second Ctrl-C ends the process at once.
    """

    def __init__(self, accelerator: Any, start_time: float, max_hours: float, step: int):
        """Take the time limit from `start_time`, in seconds of `time.monotonic`.

        `accelerator` has `num_processes` and `device`; `step` is the number of steps taken so far.
        """
        self.world_size, self.device = accelerator.num_processes, accelerator.device
        self.deadline = start_time + max_hours * 3600 if max_hours else None
        self.received: StopReason | None = None
        self.received_at = 0.0
        self.previous_handlers: dict[int, Any] = {}
        self.last_check_step = self.next_check_step = step
        self.last_check_at = time.monotonic()

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self.previous_handlers = {
                number: signal.signal(number, self._record) for number in SIGNALS
            }
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if kind and self.world_size > 1 and self.received == StopReason.SIGTERM:
            # A launcher sends SIGTERM to the other processes of one that failed and has printed its
            # error. Without it this process would report the lost process as a second error.
            os.kill(os.getpid(), signal.SIGTERM)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self.received_at > REPEAT_SECONDS:
            os._exit(130)
        if not self.received:
            self.received, self.received_at = SIGNALS[number], now
            if console.is_main_process():  # not print: the signal may have interrupted one
                os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")

    def stop_reason(self, step: int, check_now: bool = False) -> StopReason | None:
        """Return why all processes stop after `step`, or None.

        All processes call it after the same steps. They communicate about once a second, because
        doing so at every step would be slow and make the host wait for a GPU; with `check_now`,
        they communicate in this call.
        """
        own = self.received
        if not own and self.deadline and time.monotonic() > self.deadline:
            own = StopReason.TIME_LIMIT
        if self.world_size == 1:
            return own
        if step < self.next_check_step and not check_now:
            return None
        seconds = max(1e-3, time.monotonic() - self.last_check_at)
        interval = min(100, max(1, int((step - self.last_check_step) / seconds)))
        votes = torch.tensor([own or 0, interval], device=self.device)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
        reason, interval = votes.tolist()
        self.last_check_step, self.last_check_at = step, time.monotonic()
        self.next_check_step = step + interval
        return StopReason(reason) if reason else None
