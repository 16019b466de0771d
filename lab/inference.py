"""Classify images with saved weights: `lab.load_model`, `lab.predict`, and the parts of predict.py.

Errors that the caller can fix raise `lab.errors.UserError`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from lab import console
from lab.checkpoint import weights as weights_module
from lab.checkpoint.atomic_io import check_output_file, write_atomically
from lab.config.schema import EVAL_BATCH_SIZE
from lab.data import DataConfig
from lab.data.decode import decode, pixels
from lab.data.image_folder import SUFFIXES, list_images
from lab.data.sampler import shard
from lab.data.transforms import BatchTransform, EvalTransform, to_grayscale
from lab.data.workers import BatchReader
from lab.distributed import choose_precision
from lab.engine.evaluation import predict_logits
from lab.engine.training import to_device
from lab.errors import UserError, first_line
from lab.models import own

if TYPE_CHECKING:
    File = str | os.PathLike[str]
    Images = File | Image.Image | Sequence[File | Image.Image] | Tensor | np.ndarray


GIVE_IMAGES = "Give image files, or directories that contain some"


@dataclass(frozen=True)
class ImagePrediction:
    """The prediction for an image file, or the error if the file cannot be read."""

    path: str
    classes: tuple[tuple[str, float], ...]  # top-k class names and probabilities, descending
    error: str = ""

    def is_undecided(self, min_confidence: float) -> bool:
        """Return whether the confidence of the first class is below `min_confidence`."""
        return bool(self.classes) and self.classes[0][1] < min_confidence


def find_images(arguments: Sequence[str]) -> tuple[list[str], list[ImagePrediction]]:
    """Return the paths of the images to classify, and an entry for each unreadable directory.

    An argument is a file, a directory (searched recursively, sorted by name) or `-` for paths on
    standard input. Raises `UserError` if one of them does not exist, or if there is no image.

    Call it in one process and broadcast the result: processes share one standard input, and each
    would read a part of it.
    """
    paths: list[str] = []
    ignored: list[str] = []
    unreadable: list[ImagePrediction] = []

    def on_error(error: OSError) -> None:
        what = f"cannot read the directory {error.filename} ({error.strerror})"
        unreadable.append(ImagePrediction(str(error.filename), (), what))

    for argument in arguments:
        if argument == "-":
            lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
            paths += filter(None, (line.removesuffix("\r") for line in lines))
        elif os.path.isdir(argument):
            paths += sorted(list_images(Path(argument), ignored, on_error))
        elif os.path.exists(argument):
            paths.append(argument)
        else:
            raise UserError(f"there is no file {argument}", GIVE_IMAGES)
    if ignored:
        console.warn(
            f"ignoring {len(ignored)} files in directories, such as {min(ignored)}, whose suffix "
            f"is none of {', '.join(SUFFIXES)}; give their paths to classify them"
        )
    if not paths and not unreadable:
        raise UserError("there are no images to classify", GIVE_IMAGES)
    return paths, unreadable


class _ImageDataset:
    """Images as uint8 [C, size, size], indexed by a batch of indices into `items`.

    Each of `items` is a path, a Pillow image, or uint8 [C, H, W] with one or three channels. The
    result is (uint8 [n, C, size, size], the n indices, [(index, error)] of unreadable files).
    """

    def __init__(self, items: Sequence[Any] | Tensor, metadata: Mapping[str, Any]):
        self.items, self.transform = items, EvalTransform.of(DataConfig(**metadata["data"]))
        self.size, self.in_chans = metadata["model"]["image_size"], metadata["model"]["in_chans"]

    def __getitem__(self, index: Tensor) -> tuple[Tensor, list[int], list[tuple[int, UserError]]]:
        images, readable, errors = [], [], []
        for i in index.tolist():
            item = self.items[i]
            try:
                if isinstance(item, str):
                    item = decode(item, self.transform.decode_size)
                elif not isinstance(item, Tensor):
                    item = _pixels(item, i)
                images.append(self.transform(item))
                readable.append(i)
            except UserError as error:
                errors.append((i, error))
        if not images:
            return torch.empty(0, self.in_chans, self.size, self.size).byte(), readable, errors
        stacked = torch.stack(images)
        if stacked.shape[1] > self.in_chans:
            stacked = to_grayscale(stacked)
        return stacked.expand(-1, self.in_chans, -1, -1), readable, errors


def _pixels(image: Image.Image, number: int) -> Tensor:
    try:
        if not all(image.size):
            raise ValueError("it has no pixels")
        return pixels(image)
    except Exception as error:  # Pillow raises exceptions of many types
        raise UserError(f"cannot read image {number} ({error})", "Replace it") from error


def top_classes(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities float32 [n, top_k], and their classes int64 [n, top_k].

    Logits are float32 [n, K]. Of equal probabilities the first class comes first, as in evaluation;
    `Tensor.topk` has no such order.
    """
    probabilities, classes = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    return probabilities[:, :top_k], classes[:, :top_k]


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
    on_images: Callable[[list[int], Tensor, Tensor], None] | None = None,
) -> list[ImagePrediction]:
    """Return a prediction for each path, in their order, the same on every process.

    `metadata` belongs to the weights of `model`. `on_batch` is called with the number of images
    this process has classified, and the number per second; `on_images` with each batch: indices
    into `paths`, images uint8 [n, C, size, size] and predicted classes int64 [n]. A file that
    cannot be read has an error in its prediction.
    """
    names, device = metadata["class_names"], accelerator.device
    top_k = min(top_k, len(names))
    transform = BatchTransform(metadata["mean"], metadata["std"], (), device)
    batches = torch.arange(len(paths)).split(batch_size)
    batches = batches[shard(len(batches), accelerator.process_index, accelerator.num_processes)]
    read = _ImageDataset(paths, metadata).__getitem__
    # float32 represents class indices exactly; the rows of unreadable files stay zero.
    table = torch.zeros(len(paths), 2, top_k, device=device)
    errors: list[tuple[int, str]] = []
    model.eval()
    num_done, start = 0, time.perf_counter()
    with (
        BatchReader(read, num_workers if len(batches) > 1 else 0) as reader,
        accelerator.autocast(),
    ):
        for images, indices, batch_errors in reader.read(batches):
            errors += [(i, error.what) for i, error in batch_errors]
            num_done += len(indices) + len(batch_errors)
            if indices:
                inputs = transform(images.to(device))
                logits = predict_logits(model, inputs, tta) / metadata["temperature"]
                values, classes = top_classes(logits, top_k)
                rows = torch.stack((values, classes.float()), 1)
                table[torch.tensor(indices, device=device)] = rows
                if on_images is not None:
                    on_images(indices, images, classes[:, 0])
            on_batch(num_done, num_done / (time.perf_counter() - start))
    table = accelerator.reduce(table).cpu()
    error_by_index = dict(gather_object(errors) if accelerator.num_processes > 1 else errors)
    predictions = []
    for i, (path, (values, classes)) in enumerate(zip(paths, table.tolist(), strict=True)):
        top = tuple((names[int(k)], v) for v, k in zip(values, classes, strict=True))
        error = error_by_index.get(i, "")
        predictions.append(ImagePrediction(path, () if error else top, error))
    return predictions


def json_lines(predictions: Sequence[ImagePrediction], min_confidence: float = 0.0) -> bytes:
    """Return one JSON object per line for each image, with its path and `classes` or `error`.

    With `min_confidence`, `decided` is whether the confidence of the first class is as high.
    The text is UTF-8. A byte of a path that is not UTF-8 becomes the JSON escape `\\udcXX`, which
    Python reads back as the same path.
    """
    lines = []
    for p in predictions:
        classes = [{"class": name, "confidence": round(value, 6)} for name, value in p.classes]
        result: dict[str, Any] = {"error": p.error} if p.error else {"classes": classes}
        if min_confidence and not p.error:
            result["decided"] = not p.is_undecided(min_confidence)
        lines.append(json.dumps({"path": p.path, **result}, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", "backslashreplace")


def csv_rows(
    predictions: Sequence[ImagePrediction], top_k: int, min_confidence: float = 0.0
) -> bytes:
    """Return one CSV row for each image: path, error, and the top-k classes with confidence.

    With `min_confidence`, the last column, decided, is whether the first confidence is as high.
    The text is UTF-8, except that paths keep their bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, 1 + max([len(p.classes) for p in predictions], default=top_k))
    names = [f"{n}{r}" for r in ranks for n in ("class", "confidence")]
    writer.writerow(["path", "error", *names, *(["decided"] if min_confidence else [])])
    for p in predictions:
        cells = [cell for name, value in p.classes for cell in (name, f"{value:.6f}")]
        cells = cells or [""] * len(names)
        if min_confidence:
            cells.append("" if p.error else "no" if p.is_undecided(min_confidence) else "yes")
        writer.writerow([p.path, p.error, *cells])
    return text.getvalue().encode("utf-8", "surrogateescape")


def check_output(flag: str, target: str) -> None:
    """Raise `UserError` if `write_output` could not write `target`, or could replace an input."""
    if target == "-":
        return
    check_output_file(flag, Path(target))
    if Path(target).suffix.lower() in (*SUFFIXES, ".safetensors"):
        raise UserError(
            f"invalid {flag} {target}: its name is that of an image or of weights",
            "Give the name of a text file",
        )


def write_output(target: str, content: bytes) -> None:
    """Write a file atomically; `-` is standard output."""
    if target != "-":
        write_atomically(Path(target), content)
        return
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has ended, as `| head` does; Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class Prediction:
    """The predictions for N images, in their order. Tensors are on the CPU."""

    labels: Tensor  # int64 [N], the predicted classes
    names: list[str]  # their N names
    probabilities: Tensor  # float32 [N, K]
    class_names: list[str]  # of all K classes
    paths: list[str]  # of the N images, if they are files
    errors: dict[str, str]  # of unreadable files and directories, by path


def load_model(
    weights: File,
    device: str | torch.device = "auto",
    model: str | nn.Module | Callable[[int, int, int], nn.Module] = "",
) -> tuple[nn.Module, dict]:
    """Return the model in evaluation mode, and the metadata of its weights.

    `weights` is the directory of a run, its best.safetensors, or `hf://USER/NAME`, possibly with
    `@REVISION`, a repository of the Hugging Face Hub that --push-to-hub created. `device` "auto" is
    an accelerator if one is available.

    The model maps images float32 [n, C, size, size], normalized as `(pixels / 255 - mean) / std`,
    to logits float32 [n, K]. The metadata contain "class_names" (K), "mean" and "std" (C, of pixels
    from 0 to 1), "model" with "image_size" in pixels, "metrics", "temperature" (divide the logits
    by it; 1.0 without calibration) and more.

    Weights of a model of your own do not contain its code: give as `model` what it was trained
    with, `FILE.py:FUNCTION` or the argument of `train.main`. Raises `UserError`.
    """
    path = weights_module.find_weights(_as_path(weights, "weights"))
    name = model if isinstance(model, str) else own.register_object(model)
    metadata = weights_module.read_metadata(path, name)
    loaded = weights_module.load_model(path, metadata)
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        loaded = to_device(loaded, metadata["model"]["name"], torch.device(device))
    except (RuntimeError, AssertionError) as error:  # the latter: PyTorch has no support for it
        raise UserError(
            f"cannot use the device {device} ({first_line(error)})", "Give auto or cpu"
        ) from error
    return loaded.eval(), metadata


def _as_path(value: Any, name: str) -> str:
    """Return a path as text. Raises `UserError` if `value`, of the argument `name`, is none."""
    try:
        return os.fspath(value)
    except TypeError:
        raise UserError(
            f"{name} contain an object of type {type(value).__name__}", "Give paths"
        ) from None


@torch.no_grad()
def predict(
    images: Images,
    weights: File | tuple[nn.Module, dict],
    *,
    batch_size: int = EVAL_BATCH_SIZE,
) -> Prediction:
    """Return labels, class names and probabilities of images, preprocessed as in evaluation.

    `images` are paths of files or directories, Pillow images, or uint8 [N, C, H, W] from 0 to 255
    with one (gray) or three (RGB) channels. `weights` are those of `load_model`, or its result,
    which saves loading the model again. Images are cropped and resized as in training; `batch_size`
    of them are classified at a time.

    Unreadable directories and files in directories are left out: each is in `errors`, with a
    warning on standard error. Raises `UserError` if a file or image that is given itself is missing
    or cannot be read, or if no image can be read.
    """
    model, metadata = weights if isinstance(weights, tuple) else load_model(weights)
    if batch_size < 1:
        raise UserError(f"invalid batch_size {batch_size}", "Give at least 1")
    names, device = list(metadata["class_names"]), next(model.parameters()).device
    items, explicit, errors = _list_images(images)
    dataset = _ImageDataset(items, metadata)
    transform = BatchTransform(metadata["mean"], metadata["std"], (), device)
    precision = choose_precision(
        "auto", device.type, False, trained_precision=metadata["precision"]
    )
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    was_training, probabilities = model.training, []
    model.eval()
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        for index in torch.arange(len(items)).split(batch_size):
            batch, _, unreadable = dataset[index]
            for i, error in unreadable:
                path = items[i]
                if not isinstance(path, str) or path in explicit:
                    raise error
                errors[path] = error.what
            if len(batch):
                inputs = transform(batch.to(device))
                logits = predict_logits(model, inputs, tta="none") / metadata["temperature"]
                probabilities.append(logits.softmax(1).cpu())
    model.train(was_training)
    for message in errors.values():
        console.warn(message)
    if not probabilities:
        raise UserError(
            f"none of the images can be read: {next(iter(errors.values()))}", GIVE_IMAGES
        )
    joined = torch.cat(probabilities)
    labels = joined.argmax(1)
    label_names = [names[k] for k in labels.tolist()]
    paths = [path for path in items if path not in errors] if explicit else []
    return Prediction(labels, label_names, joined, names, paths, errors)


def _list_images(images: Images) -> tuple[Sequence[Any] | Tensor, set[str], dict[str, str]]:
    """Return the images as a sequence, the paths that were given explicitly, and errors by path."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if isinstance(images, Iterator):  # for example of Path.glob
        images = list(images)
    if isinstance(images, (list, tuple)):
        if any(isinstance(item, (Tensor, bytes)) or hasattr(item, "dtype") for item in images):
            raise UserError("images are a list of arrays", "Stack them to uint8 [N, C, H, W]")
        files = [_as_path(item, "images") for item in images if not isinstance(item, Image.Image)]
        if files and len(files) < len(images):
            raise UserError("images are both paths and Pillow images", "Give only one kind")
        if files or not images:
            paths, unreadable = find_images(files)
            return paths, set(files), {p.path: p.error for p in unreadable}
        return images, set(), {}
    hint = "Give uint8 [N, C, H, W] with one or three channels, paths, or Pillow images"
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images)  # PyTorch has no negative strides
    try:
        tensor = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"images are of type {type(images).__name__}", hint) from None
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"images are {kind} {list(tensor.shape)}", hint)
    if not tensor.numel():
        raise UserError("there are no images to classify", "Give at least one")
    return tensor, set(), {}
