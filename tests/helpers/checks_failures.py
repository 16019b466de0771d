"""train.py with a fault on rank 1; the tests check how all processes end.

    python tests/helpers/checks_failures.py FAULT [options of train.py]

FAULT is missing-data, none, or what happens at the fifth step: crash, killed or stopped. A process
that the launcher restarted has no fault. One that finishes prints the number of its steps.
"""

import os
import signal
import sys
import time

import train
from lab.engine.training import TrainStep
from lab.errors import run_script


def main() -> None:
    fault, *argv = sys.argv[1:]
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if os.environ.get("RANK") != "1" or restarted:
        fault = "none"
    if fault == "missing-data":
        argv += ["--dataset", "./no-such-folder"]
    run, taken = TrainStep.run, 0

    def counted(*arguments):
        nonlocal taken
        taken += 1
        if taken == 5 and fault != "none":
            fail(fault)
        return run(*arguments)

    TrainStep.run = counted
    train.main(argv)
    print(f"steps taken: {taken}\n", end="", flush=True)  # in one piece: the processes share it


def fail(fault: str) -> None:
    """Print the time and fail."""
    print("fault at", time.time(), flush=True)
    if fault == "killed":  # as Linux does when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":  # alive, with open connections, but silent
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise RuntimeError("a fault on rank 1")


if __name__ == "__main__":
    sys.exit(run_script(main))
