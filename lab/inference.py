"""lab from Python, for notebooks and other programs: train, load_model, predict.

A mistake that the caller can mend raises `lab.errors.UserError`, never SystemExit.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from lab import console
from lab.checkpoint import weights as weights_module
from lab.checkpoint.atomic_io import write_atomically
from lab.config.schema import EVAL_BATCH_SIZE
from lab.data.decode import decode, grey, pixels, square
from lab.data.image_folder import SUFFIXES, pictures
from lab.data.sampler import shard
from lab.data.transforms import BatchTransform
from lab.data.workers import BatchReader
from lab.distributed import choose_precision
from lab.engine.evaluation import predict_logits
from lab.engine.training import to_device
from lab.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    File = str | os.PathLike[str]
    Pictures = File | Image.Image | Sequence[File | Image.Image] | Tensor | np.ndarray


@dataclass(frozen=True)
class ImagePrediction:
    """What a network says of one picture; `error` instead, where it cannot be read."""

    path: str
    classes: tuple[tuple[str, float], ...]  # the likeliest first, with its softmax
    error: str = ""


def find_images(words: Sequence[str]) -> tuple[list[str], list[ImagePrediction]]:
    """Return the paths of the images that `words` name, and an entry for each unreadable directory.

    A word is a file, a directory (searched at any depth, sorted by name) or `-` for paths on
    standard input. Raises `UserError` for a word that names nothing, and if there is no image.

    Call it in one process and broadcast the result: processes share one standard input, and each
    would read a part of it.
    """
    found: list[str] = []
    others: list[str] = []
    unreadable: list[ImagePrediction] = []

    def on_error(error: OSError) -> None:
        what = f"cannot read the directory {error.filename} ({error.strerror})"
        unreadable.append(ImagePrediction(str(error.filename), (), what))

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


class _ImageDataset:
    """Indexed by the positions of a batch: (uint8 [n, C, size, size], [(position, error)])."""

    def __init__(self, paths: Sequence[str], size: int, in_chans: int):
        self.paths, self.size, self.in_chans = paths, size, in_chans

    def __getitem__(self, index: Tensor) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
        images, positions, errors = [], [], []
        for i in index.tolist():
            try:
                images.append(decode(self.paths[i], self.size))
                positions.append(i)
            except UserError as error:
                errors.append((i, error.what))
        if not images:
            return torch.empty(0, self.in_chans, self.size, self.size).byte(), positions, errors
        stacked = torch.stack(images)
        return grey(stacked) if self.in_chans == 1 else stacked, positions, errors


@torch.no_grad()
def predict_files(
    accelerator: Accelerator,
    model: nn.Module,
    metadata: dict[str, Any],
    paths: Sequence[str],
    *,
    batch_size: int,
    num_workers: int,
    top_k: int,
    tta: str = "none",
    on_batch: Callable[[int, float], None] = lambda *_: None,
) -> list[ImagePrediction]:
    """One entry a path, in their order, the same on every process.

    `about` is the metadata of the weights in `network`; `on_batch` hears how many pictures this
    process has seen, and how many a second. A picture that cannot be read is told of in its entry.
    """
    names, device = metadata["class_names"], accelerator.device
    top_k = min(top_k, len(names))
    transform = BatchTransform(metadata["mean"], metadata["std"], (), device)
    batches = torch.arange(len(paths)).split(batch_size)
    mine = batches[shard(len(batches), accelerator.process_index, accelerator.num_processes)]
    size, in_chans = metadata["model"]["image_size"], metadata["model"]["in_chans"]
    reader = BatchReader(
        _ImageDataset(paths, size, in_chans),
        mine,
        num_workers if len(mine) > 1 else 0,
        batch_nbytes=min(batch_size, len(paths)) * 3 * size**2,
        pin_memory=device.type == "cuda",
    )
    # float32 holds each class's number exactly; a row that nobody fills is one that failed.
    table = torch.zeros(len(paths), 2, top_k, device=device)
    failed: list[tuple[int, str]] = []
    model.eval()
    seen, start = 0, time.perf_counter()
    with reader, accelerator.autocast():
        for images, positions, errors in reader:
            failed += errors
            seen += len(positions) + len(errors)
            if positions:
                images = transform(images.to(device, non_blocking=True))
                top = predict_logits(model, images, tta).softmax(1).topk(top_k)
                rows = torch.stack((top.values, top.indices.float()), 1)
                table[torch.tensor(positions, device=device)] = rows
            on_batch(seen, seen / (time.perf_counter() - start))
    table = accelerator.reduce(table).cpu()
    errors_of = dict(gather_object(failed) if accelerator.num_processes > 1 else failed)
    found = []
    for i, (path, (values, classes)) in enumerate(zip(paths, table.tolist(), strict=True)):
        top_classes = tuple((names[int(k)], v) for v, k in zip(values, classes, strict=True))
        error = errors_of.get(i, "")
        found.append(ImagePrediction(path, () if error else top_classes, error))
    return found


def json_lines(found: Sequence[ImagePrediction]) -> bytes:
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


def csv_rows(found: Sequence[ImagePrediction], top_k: int) -> bytes:
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


@dataclass(frozen=True)
class Prediction:
    """What a network says of N pictures, in their order; tensors are on the CPU."""

    labels: Tensor  # int64 [N], the likeliest class of each
    names: list[str]  # its name
    probabilities: Tensor  # float32 [N, K]
    class_names: list[str]  # of all K classes
    paths: list[str]  # of the N pictures, where they came from files
    errors: dict[str, str]  # of files in folders, and folders, by path: why they are left out


def load_model(weights: File, device: str | torch.device = "auto") -> tuple[nn.Module, dict]:
    """(the network in evaluation mode, the metadata of its weights).

    `weights` is a run's folder or its best.safetensors; `device` "auto" is an accelerator where
    there is one. The network maps images float32 [n, C, size, size], `(pixels / 255 - mean) / std`,
    to logits float32 [n, K]. Metadata: "class_names" (K), "mean" and "std" (C, as shares of the
    full range), "model" with "image_size" in pixels, "metrics" and more. Raises `UserError`.
    """
    path = weights_module.find_weights(os.fspath(weights))
    metadata = weights_module.read_metadata(path)
    model = weights_module.load_model(path, metadata)
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return to_device(model, metadata["model"]["name"], torch.device(device)).eval(), metadata


@torch.no_grad()
def predict(
    pictures: Pictures,
    weights: File | tuple[nn.Module, dict],
    *,
    batch_size: int = EVAL_BATCH_SIZE,
) -> Prediction:
    """Labels, class names and probabilities of pictures, preprocessed as by predict.py.

    `pictures`: paths of files or folders, Pillow images, or uint8 [N, C, H, W], 0 to 255, of one
    grey or three colour channels. `weights`: a run's folder, its best.safetensors, or what
    `load_model` returned, which is quicker a second time. Pictures are cut to their central square
    and resized; `batch_size` of them go through the network at once.

    Files in a folder, and folders, that cannot be read are left out: each is in `errors`, with a
    warning on standard error. Raises `UserError` for a file given by name that is missing or no
    picture, and if nothing can be read.
    """
    model, metadata = weights if isinstance(weights, tuple) else load_model(weights)
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too low", "Give at least 1")
    architecture, names = metadata["model"], list(metadata["class_names"])
    device = next(model.parameters()).device
    found, named, errors = _listed(pictures)
    transform = BatchTransform(metadata["mean"], metadata["std"], (), device)
    precision = choose_precision(
        "auto", device.type, False, trained_precision=metadata["precision"]
    )
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    was_training, parts = model.training, []
    model.eval()
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        for start in range(0, len(found), batch_size):
            part = found[start : start + batch_size]
            images = _decode_images(part, architecture["image_size"], named, errors)
            if images is None:
                continue
            if images.shape[1] > architecture["in_chans"]:
                images = grey(images)
            images = images.expand(-1, architecture["in_chans"], -1, -1)
            logits = model(transform(images.to(device)))
            parts.append(logits.float().softmax(1).cpu())
    model.train(was_training)
    for error in errors.values():
        console.warn(error)
    if not parts:
        raise UserError(
            f"none of the pictures can be read: {next(iter(errors.values()))}",
            "Give pictures, or folders of them",
        )
    probabilities = torch.cat(parts)
    labels = probabilities.argmax(1)
    label_names = [names[k] for k in labels.tolist()]
    paths = [path for path in found if path not in errors] if named else []
    return Prediction(labels, label_names, probabilities, names, paths, errors)


def _listed(pictures: Pictures) -> tuple[Sequence[Any] | Tensor, set[str], dict[str, str]]:
    """Return pictures that can be cut into batches, the paths given by name, and errors by path."""
    if isinstance(pictures, (str, os.PathLike, Image.Image)):
        pictures = [pictures]
    if isinstance(pictures, (list, tuple)):
        if any(isinstance(one, (Tensor, bytes)) or hasattr(one, "dtype") for one in pictures):
            raise UserError("pictures are a list of arrays", "Stack them to uint8 [N, C, H, W]")
        files = [os.fspath(one) for one in pictures if not isinstance(one, Image.Image)]
        if files and len(files) < len(pictures):
            raise UserError("pictures mix paths and images", "Give one kind")
        if files or not pictures:
            paths, unreadable = find_images(files)
            return paths, set(files), {one.path: one.error for one in unreadable}
        return pictures, set(), {}
    tensor = torch.as_tensor(pictures)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"pictures are {kind} {list(tensor.shape)}",
            "Give uint8 [N, C, H, W] with one or three channels, paths, or Pillow images",
        )
    if not tensor.numel():
        raise UserError("there are no pictures to classify", "Give one or more")
    return tensor, set(), {}


def _decode_images(
    pictures: Sequence[Any] | Tensor, size: int, named: set[str], errors: dict[str, str]
) -> Tensor | None:
    """Return the pictures as uint8 [n, C, size, size]; None if there are none left.

    A file that cannot be read is left out and added to `errors`, or raises if it is `named`.
    """
    if isinstance(pictures, Tensor):
        return square(pictures, size)
    images = []
    for one in pictures:
        try:
            images.append(decode(one, size) if isinstance(one, str) else square(pixels(one), size))
        except UserError as error:
            if one in named:
                raise
            errors[one] = error.what
    return torch.stack(images) if images else None
