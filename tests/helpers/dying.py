"""Let a process die, or a disk be full, at the n-th file operation.

    with Fault(folder, n) as fault:
        fault.attempt(save)
    fault.struck      # False if `save` needs fewer operations than n

Python's audit hooks see every file that is opened, renamed, removed, created or truncated. Writes
and syncs are patched.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Died(BaseException):
    """The process died: file operations of `finally` blocks fail too."""


class Fault:
    """A context manager in which the n-th file operation below `folder` and all later ones fail.

    The process dies; with `power`, content that was not synced is lost too. With `full`, it lives
    and the n-th operation fails for lack of space, with `lasting` all later ones too.
    """

    current: "Fault | None" = None

    def __init__(
        self, folder: Path, n: int, full: bool = False, lasting: bool = False, power: bool = False
    ):
        self.folder, self.n = str(folder), n
        self.full, self.lasting, self.power = full, lasting, power
        self.count, self.struck, self.patch = 0, False, pytest.MonkeyPatch()
        self.log: list[str] = []
        self.unsynced: set[int] = set()  # inodes

    def __enter__(self) -> "Fault":
        fsync = os.fsync

        def write(path: Path, content: bytes) -> None:
            """Write the first half before the operation that may fail."""
            with open(path, "wb", buffering=0) as file:
                self.unsynced.add(os.fstat(file.fileno()).st_ino)
                file.write(content[: len(content) // 2])
                self.operation("write")
                file.write(content[len(content) // 2 :])

        def watched_fsync(descriptor: int) -> None:
            self.operation("fsync")
            fsync(descriptor)
            self.unsynced.discard(os.fstat(descriptor).st_ino)

        self.patch.setattr(os, "fsync", watched_fsync)
        self.patch.setattr(Path, "write_bytes", write)
        Fault.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Fault.current = None
        self.patch.undo()
        if self.struck and self.power:
            for path in Path(self.folder).rglob("*"):
                if path.is_file() and path.stat().st_ino in self.unsynced:
                    os.truncate(path, path.stat().st_size // 2)

    def attempt(self, work: Callable[[], object]) -> None:
        """Call `work` until the process dies."""
        with suppress(Died):
            work()

    def operation(self, name: str) -> None:
        self.count += 1
        self.log.append(name)
        if self.count == self.n or (self.struck and (self.lasting or not self.full)):
            self.struck = True
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise Died

    def concerns(self, event: str, arguments: tuple) -> bool:
        if event not in OPERATIONS:
            return False
        path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
        # shutil.rmtree uses paths relative to an open directory.
        inside = str(path).startswith(self.folder) or not os.path.isabs(path)
        reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if self.full and (reads or event in ("os.remove", "os.rmdir")):
            return False  # need no space
        return inside


def _hook(event: str, arguments: tuple) -> None:
    fault = Fault.current
    if fault and fault.concerns(event, arguments):
        fault.operation(event)


sys.addaudithook(_hook)  # once per process: hooks cannot be removed
