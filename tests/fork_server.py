"""A fork server for test_mutants.py: runs tests of a copied tree without importing PyTorch again.

    python tests/fork_server.py TREE

It reads a line for each job, node ids separated by tabs, and answers with pytest's exit code. What
pytest prints goes to TREE/output.txt. The server imports the libraries and nothing of lab, so each
fork imports lab as the tree has it at that moment.
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
HUNG = -1  # the answer for tests that did not end
LIMIT, TEST_LIMIT = 240, 100  # seconds


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
    """Return the exit code of a child, which is killed after LIMIT seconds."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, SIGKILL)
    os.waitpid(child, 0)
    return HUNG


def run(tree: Path, tests: list[str]) -> None:
    """Run tests in this process, a child, and end it with pytest's exit code."""
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
        options += ["-o", f"timeout={TEST_LIMIT}", "--rootdir", ".", "--basetemp", "../tmp"]
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
    sys.dont_write_bytecode = True  # a mutant may have the size and the second of the one before
    sys.path.pop(0)
    serve(Path(sys.argv[1]).resolve())
