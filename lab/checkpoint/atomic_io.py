"""What a disk refuses: what then helps, by the number of the system's error, and what has room."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.errors import UserError


def to_json(content: Any, **settings: Any) -> str:
    """Return `content` as JSON, which has no NaN and no infinity: such numbers are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(content), allow_nan=False, **settings)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, which then takes the name `path`.

    Whenever the machine stops, `path` has the old content or the new.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors_as_user_errors(path):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            if os.name == "posix":  # the rename itself is on disk once its folder is
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when the disk has what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SPACE = "Free some space, or name another folder"
_NO_FOLDER, _FORBIDDEN = "Name a folder, not a file", "Name a folder that you may write to"
HINTS = {
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "Name a file, not a folder",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOENT: "Make its folder first, or name another",
    errno.ENAMETOOLONG: "Give a shorter name",
}


def write_error(path: Path, error: OSError) -> UserError:
    """The mistake of naming `path`, which the operating system does not write for this `error`."""
    hint = HINTS.get(error.errno or 0, SPACE)
    return UserError(f"cannot write {path} ({error.strerror or error})", hint)


def check_output_file(flag: str, path: Path) -> None:
    """Nothing; raises `UserError` where no file can be put: in no folder, in place of one."""
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"{flag} {path} is a folder", "Name a file")
    if not os.path.isdir(path.parent):
        raise UserError(f"{flag} {path}: there is no folder {path.parent}", "Make it first")


def check_free_space(path: Path, num_bytes: int) -> None:
    """Nothing; raises `UserError` where the disk has fewer than `num_bytes` free."""
    while not os.path.exists(path):  # Path.exists raises for a name that is too long
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        raise UserError(
            f"a state takes {format_bytes(num_bytes)}, and {path} has {format_bytes(free)} left",
            "Free some space, or name another --output-dir",
        )


def format_bytes(num_bytes: int) -> str:
    """A size for people: 512 bytes, 61.7 kB, 1.5 GB."""
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    power = 1 if num_bytes < 999_950 else 2 if num_bytes < 999_950_000 else 3
    return f"{num_bytes / 1000**power:,.1f} {('kB', 'MB', 'GB')[power - 1]}"


@contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


class AsyncWriter:
    """Writes files while training goes on, one thing at a time and in the order given."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Whatever ended the training, what was given reaches the disk."""
        self.pool.shutdown()
        if kind is None:
            self.wait()

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Begins `write(*args)`, once what came before is whole: memory holds one copy at most."""
        self.wait()
        self.pending = self.pool.submit(write, *args)

    def wait(self) -> None:
        """Returns when all is written; raises the `UserError` of a write that failed."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()
