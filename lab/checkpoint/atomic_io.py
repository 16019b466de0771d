"""Atomic file writes, also in the background, whose failures are user errors; and JSON."""

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
    """Return `content` as JSON. NaN and infinity, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(content), allow_nan=False, **settings)


def check_types(group: Any, types: Mapping[str, Any]) -> None:
    """Raise ValueError unless `group`, read from JSON, is a dict that has values of these types."""
    for name, kind in types.items():
        if not isinstance(group, dict) or name not in group:
            raise ValueError(f"{name} is missing")
        if not isinstance(group[name], (int, float) if kind is float else kind):
            raise ValueError(f"{name} is not a value of type {getattr(kind, '__name__', kind)}")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a temporary file and rename it to `path`; text becomes UTF-8.

    After a power failure at any moment, `path` has either its old or its new content. Raise
    `UserError` if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors_as_user_errors(path):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(temporary)
            os.replace(temporary, path)
            if os.name == "posix":  # the rename is durable once its directory is synced
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, such as shared folders of virtual machines, cannot sync directories.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


_NOT_A_DIRECTORY = "Give a directory, not a file"
_NO_PERMISSION = "Give a directory with write permission"
HINTS = {
    errno.ENOTDIR: _NOT_A_DIRECTORY,
    errno.EEXIST: _NOT_A_DIRECTORY,
    errno.EISDIR: "Give a file, not a directory",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: _NO_PERMISSION,
    errno.ENOENT: "Create its directory first, or give another one",
    errno.ENAMETOOLONG: "Give a shorter name",
}


def write_error(path: Path, error: OSError) -> UserError:
    """Return the `UserError` for a `path` that could not be written."""
    hint = HINTS.get(error.errno or 0, "Free some space, or give another directory")
    return UserError(f"cannot write {path} ({error.strerror or error})", hint)


def check_output_file(flag: str, path: Path) -> None:
    """Raise `UserError` if `path` cannot be written, or is no file and must not be replaced."""
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"invalid {flag} {path}: it is a directory", "Give a file name")
    if os.path.exists(path) and not os.path.isfile(path):  # renaming would replace a device
        raise UserError(f"invalid {flag} {path}: it is not a regular file", "Give a file name")
    if not os.path.isdir(path.parent):
        raise UserError(
            f"invalid {flag} {path}: there is no directory {path.parent}", "Create it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise write_error(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def check_free_space(path: Path, num_bytes: int) -> None:
    """Raise `UserError` if the disk of `path` has no room for a checkpoint of `num_bytes`."""
    while not os.path.exists(path):  # Path.exists raises for a name that is too long
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        raise UserError(
            f"a checkpoint takes {format_bytes(num_bytes)}, but {path} has "
            f"{format_bytes(free)} free",
            "Free some space, or give another --output-dir",
        )


def format_bytes(num_bytes: int) -> str:
    """Return a size with its unit: 512 bytes, 61.7 kB, 1.5 GB."""
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    power = 1 if num_bytes < 999_950 else 2 if num_bytes < 999_950_000 else 3
    return f"{num_bytes / 1000**power:,.1f} {('kB', 'MB', 'GB')[power - 1]}"


@contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while `path` is written into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


class AsyncWriter:
    """Write files in a background thread, one at a time and in order, while training continues."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Wait until all files are written, also after an exception."""
        self.pool.shutdown()
        if kind is None:
            self.wait()

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Start `write(*args)` after the previous write: memory holds one copy at most."""
        self.wait()
        self.pending = self.pool.submit(write, *args)

    def wait(self) -> None:
        """Wait until all is written. Raise the `UserError` of a write that failed."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()
