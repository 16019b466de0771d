"""Classes of pictures in files by saved weights, preprocessed as in evaluation."""

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from lab import console
from lab.data.augment import Preprocess
from lab.data.decode import decode, grey
from lab.data.folder import SUFFIXES, pictures
from lab.data.loaders import shard
from lab.data.workers import BatchReader
from lab.errors import UserError
from lab.rundir import write_atomically
from lab.tta import outputs


@dataclass(frozen=True)
class Classified:
    """What a network says of one picture; `error` instead, where it cannot be read."""

    path: str
    classes: tuple[tuple[str, float], ...]  # the likeliest first, with its softmax
    error: str = ""


def find_pictures(words: Sequence[str]) -> tuple[list[str], list[Classified]]:
    """Return the paths of the images that `words` name, and an entry for each unreadable directory.

    A word is a file, a directory (searched at any depth, sorted by name) or `-` for paths on
    standard input. Raises `UserError` for a word that names nothing, and if there is no image.

    Call it in one process and broadcast the result: processes share one standard input, and each
    would read a part of it.
    """
    found: list[str] = []
    others: list[str] = []
    unreadable: list[Classified] = []

    def on_error(error: OSError) -> None:
        what = f"cannot read the directory {error.filename} ({error.strerror})"
        unreadable.append(Classified(str(error.filename), (), what))

    for word in words:
        if word == "-":
            found += filter(None, os.fsdecode(sys.stdin.buffer.read()).split("\n"))
        elif os.path.isdir(word):
            found += sorted(pictures(Path(word), others, on_error))
        elif _exists(word):
            found.append(word)
        else:
            raise UserError(f"there is no file {word}", "Give pictures, or folders of them")
    if others:
        console.warn(
            f"{len(others)} of the files in folders are left out, as {min(others)}: "
            f"not {', '.join(SUFFIXES)}. Name them one by one to have them classified."
        )
    if not found and not unreadable:
        raise UserError("there are no pictures to classify", "Give pictures, or folders of them")
    return found, unreadable


def _exists(path: str) -> bool:
    """Return whether there is such a file; also if only reading it can tell."""
    try:
        os.stat(path)
    except PermissionError:
        pass
    except (OSError, ValueError):
        return False
    return True


class _Pictures:
    """Indexed by the positions of a batch: (uint8 [n, C, size, size], [(position, error)])."""

    def __init__(self, paths: Sequence[str], size: int, channels: int):
        self.paths, self.size, self.channels = paths, size, channels

    def __getitem__(self, index: Tensor) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
        images, positions, errors = [], [], []
        for i in index.tolist():
            try:
                images.append(decode(self.paths[i], self.size))
                positions.append(i)
            except UserError as error:
                errors.append((i, error.what))
        if not images:
            return torch.empty(0, self.channels, self.size, self.size).byte(), positions, errors
        stacked = torch.stack(images)
        return grey(stacked) if self.channels == 1 else stacked, positions, errors


@torch.no_grad()
def classify(
    accelerator: Accelerator,
    network: nn.Module,
    about: dict[str, Any],
    paths: Sequence[str],
    *,
    batch_size: int,
    num_workers: int,
    top_k: int,
    tta: str = "none",
    on_batch: Callable[[int, float], None] = lambda *_: None,
) -> list[Classified]:
    """One entry a path, in their order, the same on every process.

    `about` is the metadata of the weights in `network`; `on_batch` hears how many pictures this
    process has seen, and how many a second. A picture that cannot be read is told of in its entry.
    """
    names, device = about["class_names"], accelerator.device
    top_k = min(top_k, len(names))
    preprocess = Preprocess(about["mean"], about["std"], (), device)
    batches = torch.arange(len(paths)).split(batch_size)
    mine = batches[shard(len(batches), accelerator.process_index, accelerator.num_processes)]
    size, channels = about["model"]["image_size"], about["model"]["channels"]
    reader = BatchReader(
        _Pictures(paths, size, channels),
        mine,
        num_workers if len(mine) > 1 else 0,
        batch_nbytes=min(batch_size, len(paths)) * 3 * size**2,
        pin_memory=device.type == "cuda",
    )
    # float32 holds each class's number exactly; a row that nobody fills is one that failed.
    table = torch.zeros(len(paths), 2, top_k, device=device)
    failed: list[tuple[int, str]] = []
    network.eval()
    seen, start = 0, time.perf_counter()
    with reader, accelerator.autocast():
        for images, positions, errors in reader:
            failed += errors
            seen += len(positions) + len(errors)
            if positions:
                images = preprocess(images.to(device, non_blocking=True))
                top = outputs(network, images, tta).softmax(1).topk(top_k)
                rows = torch.stack((top.values, top.indices.float()), 1)
                table[torch.tensor(positions, device=device)] = rows
            on_batch(seen, seen / (time.perf_counter() - start))
    table = accelerator.reduce(table).cpu()
    errors_of = dict(gather_object(failed) if accelerator.num_processes > 1 else failed)
    found = []
    for i, (path, (values, classes)) in enumerate(zip(paths, table.tolist(), strict=True)):
        top_classes = tuple((names[int(k)], v) for v, k in zip(values, classes, strict=True))
        error = errors_of.get(i, "")
        found.append(Classified(path, () if error else top_classes, error))
    return found


def json_lines(found: Sequence[Classified]) -> bytes:
    """Return one JSON object per line for each image, with its path and `classes` or `error`.

    The text is UTF-8. A byte of a path that is not UTF-8 becomes the JSON escape `\\udcXX`, which
    Python reads back as the same path.
    """
    lines = []
    for one in found:
        classes = [{"class": name, "confidence": round(value, 6)} for name, value in one.classes]
        result = {"error": one.error} if one.error else {"classes": classes}
        lines.append(json.dumps({"path": one.path, **result}, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", "backslashreplace")


def csv_rows(found: Sequence[Classified], top_k: int) -> bytes:
    """Return one CSV row for each image: path, error, and the likeliest classes with confidence.

    The text is UTF-8, but for paths that are not: these keep their bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, 1 + max([len(one.classes) for one in found], default=top_k))
    writer.writerow(["path", "error", *(f"{n}{r}" for r in ranks for n in ("class", "confidence"))])
    for one in found:
        cells = [cell for name, value in one.classes for cell in (name, f"{value:.6f}")]
        writer.writerow([one.path, one.error, *(cells or [""] * (2 * len(ranks)))])
    return text.getvalue().encode("utf-8", "surrogateescape")


def write_output(target: str, content: bytes) -> None:
    """Write to a file, completely or not at all; `-` is standard output."""
    if target == "-":
        sys.stdout.buffer.write(content)
    else:
        write_atomically(Path(target), lambda path: path.write_bytes(content))
