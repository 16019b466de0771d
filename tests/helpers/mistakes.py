"""Helpers of the tests of error messages (P7), beside the fixture `fails` of conftest.py."""

import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FULL = "Free some space, or give another directory."
NO_FOLDER = "Give a directory, not a file."


def tree(folder: Path) -> dict[str, object]:
    """Return every file below a directory with its content, and every directory with None."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def matches(message: str, expected: str) -> bool:
    """Return whether a message is the expected one, in which `(*)` matches any reason."""
    return re.fullmatch(re.escape(expected).replace(r"\(\*\)", r"\(.+\)"), message) is not None


def make_picture(path: Path, **settings) -> Path:
    """Write an image whose pixels depend on the names of the file and its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32("/".join(path.parts[-3:]).encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return path
