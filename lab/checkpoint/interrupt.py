"""When a training stops before its end: a signal or its time limit, agreed on by all processes."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed

from lab import console

SIGNALS = {  # Slurm warns with SIGUSR1 of a job's end
    name: getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)
}
TIME_LIMIT = -1
PAUSE = 1.0  # seconds in which a signal, sent to a process and to its group, counts once


class InterruptHandler:
    """Within it, signals do not end the process: they are noted, and asked for between steps.

    A second Ctrl-C ends it at once.
    """

    def __init__(self, world: Any, began: float, max_hours: float, step: int):
        """`world` has `num_processes` and `device`; `began` is what time.monotonic() was."""
        self.world_size, self.device = world.num_processes, world.device
        self.deadline = began + max_hours * 3600 if max_hours else None
        self.received = 0  # the signal's number
        self.received_at = 0.0
        self.before: dict[int, Any] = {}
        self.asked_step, self.asked_at, self.next_step = step, time.monotonic(), step

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():  # else Python allows it not
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS.values()}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind and self.world_size > 1 and self.received == signal.SIGTERM:
            # A launcher ends the other processes of one that failed and has said why. Without the
            # signal, which was noted here, this process would report the lost one as well.
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self.received_at > PAUSE:
            os._exit(130)
        if not self.received:
            self.received, self.received_at = number, now
            if console.is_main_process():  # no print: the signal may have come in the middle of one
                os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")

    def reason(self, step: int, must_ask: bool = False) -> int:
        """Why all processes stop after `step`: a signal's number, TIME_LIMIT, or 0.

        Called by all with the same steps. They ask each other about once a second: at every step
        would be slow, and on a GPU make the host wait. `must_ask`: now, whenever they last did.
        """
        mine = self.received
        if not mine and self.deadline and time.monotonic() > self.deadline:
            mine = TIME_LIMIT
        if self.world_size == 1:
            return mine
        if step < self.next_step and not must_ask:
            return 0
        seconds = time.monotonic() - self.asked_at
        pause = min(100, max(1, int((step - self.asked_step) / max(1e-3, seconds))))
        asked = torch.tensor([mine, -mine, pause], device=self.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        highest, lowest, pause = asked.tolist()
        self.asked_step, self.asked_at, self.next_step = step, time.monotonic(), step + pause
        return highest or -lowest

    @staticmethod
    def describe(reason: int) -> str:
        """`reason` in words."""
        names = {TIME_LIMIT: "--max-hours is over", signal.SIGINT: "Ctrl-C"}
        return names.get(reason) or signal.Signals(reason).name

    @staticmethod
    def exit_code(reason: int) -> int:
        """What a script ends with: 0 at its time limit, 130 after Ctrl-C, else 143."""
        return {TIME_LIMIT: 0, signal.SIGINT: 130}.get(reason, 143)
