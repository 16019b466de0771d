"""The versions of the libraries and the commit of lab that a result was produced with."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lab


def versions(*extras: str) -> dict[str, str]:
    """Return the version of each library that results depend on, and of the libraries `extras`."""
    result = {"lab": lab.__version__, "python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "pillow", "accelerate", "safetensors", *extras):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "unknown"
    return result


def commit() -> str | None:
    """Return the commit of the code, with "+changes" if files were modified; None outside git.

    results/ does not count: it holds no code.
    """
    root = Path(lab.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        # A run that is killed while git holds the lock of its index would leave the lock behind.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = [str(root), f":(exclude){root / 'results'}"]
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
