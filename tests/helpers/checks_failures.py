"""train.py with a fault on process 1 of its world; the tests look at how all end.

    python tests/helpers/checks_failures.py FAULT [options of train.py]

FAULT: missing-data; at the fifth step crash, killed, killed-once (in the world's first life alone)
or stopped; or none. A process that ends well prints how many steps it took.
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
    if os.environ.get("RANK") != "1" or (fault == "killed-once" and restarted):
        fault = "none"
    if fault == "missing-data":
        argv += ["--data-dir", "no-such-folder"]
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
    """Commits the fault, whose time it prints."""
    print("fault at", time.time(), flush=True)
    if fault.startswith("killed"):  # as a system short of memory does
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":  # alive, its connections open, and silent
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise RuntimeError("a fault on process 1")


if __name__ == "__main__":
    sys.exit(run_script(main))
