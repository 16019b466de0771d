"""A fork server for test_mutants.py: runs tests of a copy of the code without reimporting PyTorch.

    python tests/helpers/fork_server.py TREE

It reads one job per line, node ids separated by tabs, and answers each with pytest's exit code. The
output of pytest goes to TREE/output.txt. The server imports libraries but nothing of lab, so every
fork imports lab as it is in TREE at that moment.
"""

import importlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

LIBRARIES = (
    "accelerate", "filelock", "pytest", "rich.live", "safetensors.torch", "sklearn.metrics",
    "torch.utils.data", "torchvision.transforms.v2", "_pytest.monkeypatch", "PIL.Image",
)  # fmt: skip
OUTPUT = "output.txt"
TIMED_OUT = -1
JOB_LIMIT_SECONDS, TEST_LIMIT_SECONDS = 240, 100


def serve(tree: Path) -> None:
    """Answer each line of standard input until it ends."""
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(tree, line.rstrip("\n").split("\t"))
        print(wait(child), flush=True)


def wait(child: int) -> int:
    """Return the exit code of a child process, or kill it at the time limit."""
    deadline = time.monotonic() + JOB_LIMIT_SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, SIGKILL)
    os.waitpid(child, 0)
    return TIMED_OUT


def run(tree: Path, tests: list[str]) -> None:
    """Run tests in this child process, and exit with pytest's exit code."""
    code = 3  # pytest's code for an internal error
    try:
        os.setsid()
        os.chdir(tree)
        with open(OUTPUT, "wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        import pytest

        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--assert=plain"]
        options += ["-o", f"timeout={TEST_LIMIT_SECONDS}", "--rootdir", ".", "--basetemp", "../tmp"]
        code = int(pytest.main([*options, *tests]))
        lab = sys.modules.get("lab")
        if lab and tree not in Path(str(lab.__file__)).parents:
            print(f"lab was imported from {lab.__file__}")
            code = 3
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # two mutants may have the same size and modification time
    sys.path.pop(0)
    serve(Path(sys.argv[1]).resolve())
