"""What code a number depends on: the libraries' versions, and lab's own commit."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lab


def versions() -> dict[str, str]:
    """The version of each library that a number depends on."""
    found = {"lab": lab.__version__, "python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str | None:
    """The commit that the code is at, with "+changes" where files differ; None outside git.

    results/ is no code: rows that are added to it change nothing of those that follow.
    """
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        # Without its lock of the index: a training that is killed now would leave it behind.
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = [str(folder.parent), f":(exclude){folder.parent / 'results'}"]
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
