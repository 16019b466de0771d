"""lab from Python, for notebooks and other programs: train, load_model, predict.

A mistake that the caller can mend raises `lab.errors.UserError`, never SystemExit.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn

import lab
from lab import checkpoint, console, rundir
from lab.commandline import as_keywords, parse_arguments, words_of
from lab.config import EVAL_BATCH_SIZE, TrainConfig
from lab.data.augment import Preprocess
from lab.data.decode import decode, grey, pixels, square
from lab.distributed import choose_precision
from lab.engine import lay_out
from lab.errors import UserError, mistake_of
from lab.prediction import find_pictures

if TYPE_CHECKING:
    import numpy as np

    File = str | os.PathLike[str]
    Pictures = File | Image.Image | Sequence[File | Image.Image] | Tensor | np.ndarray


@dataclass(frozen=True)
class TrainedRun:
    """A training that ended; the same on every process."""

    path: Path  # the run's folder
    report: dict[str, Any] | None  # report.json; None where the training was stopped before its end

    @property
    def weights(self) -> Path:
        """best.safetensors: the best epoch's weights."""
        return self.path / rundir.BEST


@dataclass(frozen=True)
class Prediction:
    """What a network says of N pictures, in their order; tensors are on the CPU."""

    labels: Tensor  # int64 [N], the likeliest class of each
    names: list[str]  # its name
    probabilities: Tensor  # float32 [N, K]
    class_names: list[str]  # of all K classes
    paths: list[str]  # of the N pictures, where they came from files
    errors: dict[str, str]  # of files in folders, and folders, by path: why they are left out


def train(config: TrainConfig | Mapping[str, Any] | None = None, /, **settings: Any) -> TrainedRun:
    """A new run, or one that went on, by train.py: its folder and its report.

    Settings are train.py's options by name, `lab.train(dataset="digits", batch_size=64)`, checked
    as they are; a dict of them, or a whole TrainConfig, may come first. Ctrl-C saves and returns a
    run without a report. Raises `UserError`.

    In a world of processes each of them calls it. In a notebook, Accelerate's
    `notebook_launcher(lab.train, ({"dataset": "digits"},), num_processes=2)` starts one, before
    another `lab.train` of that kernel: docs/notebook.ipynb.
    """
    given = asdict(config) if isinstance(config, TrainConfig) else dict(config or {})
    words = words_of(TrainConfig, given | settings)
    try:
        checked = parse_arguments(TrainConfig, words, prog="train.py", about="")
        _, run = _script().train(checked)
    except Exception as error:
        mistake = mistake_of(error)
        if mistake is None:
            raise
        what, hint = (as_keywords(TrainConfig, text) for text in (mistake.what, mistake.hint))
        cause = None if mistake is error else error
        raise UserError(what, hint, mistake.lone) from cause
    report = run.path / rundir.REPORT
    result = TrainedRun(run.path, json.loads(report.read_text()) if report.exists() else None)
    if PartialState().num_processes > 1:  # one of them knows the folder
        result = broadcast_object_list([result])[0]
    return result


@cache
def _script() -> ModuleType:
    """train.py, whose loop is not repeated here. It lies beside the package in a checkout."""
    path = Path(lab.__file__).resolve().parents[1] / "train.py"
    spec = importlib.util.spec_from_file_location("lab_train_script", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(
            f"lab.train runs train.py, and there is no {path}",
            "Install lab from a checkout that you keep: pip install -e .",
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_model(weights: File, device: str | torch.device = "auto") -> tuple[nn.Module, dict]:
    """(the network in evaluation mode, the metadata of its weights).

    `weights` is a run's folder or its best.safetensors; `device` "auto" is an accelerator where
    there is one. The network maps images float32 [n, C, size, size], `(pixels / 255 - mean) / std`,
    to logits float32 [n, K]. Metadata: "class_names" (K), "mean" and "std" (C, as shares of the
    full range), "model" with "image_size" in pixels, "metrics" and more. Raises `UserError`.
    """
    path = checkpoint.find_weights(os.fspath(weights))
    info = checkpoint.read_info(path)
    network = checkpoint.load_model(path, info)
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return lay_out(network, info["model"]["name"], torch.device(device)).eval(), info


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
    network, info = weights if isinstance(weights, tuple) else load_model(weights)
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too low", "Give at least 1")
    model, names = info["model"], list(info["class_names"])
    device = next(network.parameters()).device
    found, named, errors = _listed(pictures)
    preprocess = Preprocess(info["mean"], info["std"], (), device)
    precision = choose_precision("auto", device.type, False, trained_in=info["precision"])
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    was_training, parts = network.training, []
    network.eval()
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        for start in range(0, len(found), batch_size):
            part = found[start : start + batch_size]
            images = _decode(part, model["image_size"], named, errors)
            if images is None:
                continue
            if images.shape[1] > model["channels"]:
                images = grey(images)
            images = images.expand(-1, model["channels"], -1, -1)
            logits = network(preprocess(images.to(device)))
            parts.append(logits.float().softmax(1).cpu())
    network.train(was_training)
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
            paths, unreadable = find_pictures(files)
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


def _decode(
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
