"""train.py with a fault on process 1 of its world; test_distributed.py looks at how all end.

python tests/checks_failures.py missing-data|crash|killed [options of train.py]
"""

import os
import signal
import sys
import time

import train
from lab import engine
from lab.errors import run_script


def main() -> None:
    fault, *argv = sys.argv[1:]
    if os.environ["RANK"] == "1":
        if fault == "missing-data":
            argv += ["--data-dir", "no-such-folder"]
        else:
            engine.train_step = fails_at_step(5, fault)
    train.main(argv)


def fails_at_step(last: int, fault: str):
    """train_step, but for the fault at step `last`, whose time it prints."""
    original, step = engine.train_step, 0

    def train_step(trainer, batch):
        nonlocal step
        step += 1
        if step == last:
            print("fault at", time.time(), flush=True)
            if fault == "killed":  # as a system short of memory does
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a fault on process 1")
        return original(trainer, batch)

    return train_step


if __name__ == "__main__":
    sys.exit(run_script(main))
