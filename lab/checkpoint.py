"""Weights files that describe themselves (promises P4, P5): safetensors, no pickle."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lab.config import TrainConfig
from lab.data import DataConfig, Splits, find_dataset
from lab.data.sources import Split
from lab.distributed import together
from lab.errors import UserError
from lab.models import find_model
from lab.rundir import BEST, RunDir, write_atomically
from lab.versions import versions

# All metadata is one JSON text under one key: with several keys, the format keeps no fixed order,
# and the same weights would not give the same bytes.
KEY = "lab"
FORMAT = 1
START = 32  # bytes in which a file of ours says twice what it is: __metadata__ and KEY

# What the scripts read of it, and its types in JSON.
ABOUT = {
    "format": int,
    "model": dict,
    "data": dict,
    "class_names": list,
    "mean": list,
    "std": list,
    "precision": str,
    "fingerprints": dict,
    "best_epoch": int,
    "selected_on": str,
}
MODEL = {"name": str, "num_classes": int, "channels": int, "image_size": int}


def about_run(config: TrainConfig, splits: Splits, precision: str) -> dict[str, Any]:
    """All that is needed to use the weights of a run, but for the epoch that they come from."""
    return {
        "model": {
            "name": config.model,
            "num_classes": len(splits.train.class_names),
            "channels": splits.train.images.shape[1],
            "image_size": config.image_size,
        },
        "data": asdict(DataConfig.of(config)),
        "class_names": splits.train.class_names,
        "mean": splits.mean,
        "std": splits.std,
        "precision": precision,
        "fingerprints": splits.fingerprints,
        "recipe": config.recipe,
        "seed": config.seed,
        "select_by": config.select_by,
        "selected_on": splits.selected_on,
        "versions": versions(),
    }


class Writer:
    """Writes files while training goes on, one thing at a time and in the order given."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Writer":
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


class BestWeights:
    """A run's best.safetensors, written by the main process."""

    def __init__(self, run: RunDir, writer: Writer):
        self.run, self.writer = run, writer

    def save(self, network: nn.Module, about: dict[str, Any], row: dict[str, Any]) -> None:
        """Takes a copy of the weights and begins to write it.

        The metadata is `about` the run, and the epoch that the weights are of: `row`, its line of
        history.jsonl. Times stay out, so that equal runs give equal files.
        """
        if not self.run.writes:
            return
        metrics = {name: value for name, value in row.items() if name.startswith("val_")}
        info = {**about, "best_epoch": row["epoch"], "metrics": metrics}
        self.writer.wait()
        self.writer.submit(write_weights, self.run.best, copy_of(network), info)

    def load(self, accelerator: Accelerator, network: nn.Module) -> None:
        """Fills `network` on every process from the file, which only the main one need see."""
        with together(accelerator):
            self.writer.wait()
            if self.run.writes:
                load_weights(self.run.best, network)
        if accelerator.num_processes > 1:
            for tensor in network.state_dict().values():
                broadcast(tensor)


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """The plain network's tensors, copied to the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }


def write_weights(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Writes tensors and `info` (JSON-able) to `path`, whole or not at all."""
    info = {"format": FORMAT, **info, "sha256": checksum(tensors)}
    metadata = {KEY: json.dumps(info, sort_keys=True)}
    # In memory first: save_file's own errors do not say that the disk is full.
    content = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of CPU tensors' names, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_weights(path: str) -> Path:
    """The weights file of a run's folder, or the file itself; raises `UserError`."""
    found = Path(path)
    if os.path.isdir(found):  # Path.is_dir raises for a name that is too long
        found = found / BEST
        if not found.exists():
            raise UserError(f"{path} holds no {BEST}", "Give the folder of a finished run")
    if not os.path.isfile(found):
        raise UserError(f"there is no file {found}", "Give a run's folder or its best.safetensors")
    return found


def read_info(path: Path) -> dict[str, Any]:
    """The metadata of a weights file. Raises `UserError` for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if KEY not in metadata:
        raise _foreign(path)
    try:
        info = json.loads(metadata[KEY])
        require_types(info, {"format": int})
        if info["format"] == FORMAT:
            _require_usable(info)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        reason = error.what if isinstance(error, UserError) else error
        raise UserError(
            f"{path} does not say what network it holds ({reason})",
            "Give a file that train.py wrote",
        ) from error
    if info["format"] != FORMAT:
        raise UserError(
            f"{path} has format {info['format']}, not {FORMAT}", "Use a newer version of lab"
        )
    return info


def _require_usable(info: dict[str, Any]) -> None:
    """Nothing; raises where metadata, which may be a stranger's, is not as `about_run` makes it."""
    require_types(info, ABOUT)
    model, data = info["model"], info["data"]
    require_types(model, MODEL)
    find_model(model["name"])
    require_types(asdict(DataConfig(**data)), get_type_hints(DataConfig))  # older files lack fields
    find_dataset(data["dataset"])
    TrainConfig(mixed_precision=info["precision"], **data)  # checks bounds and choices
    names, mean, std = info["class_names"], info["mean"], info["std"]
    fits = {
        "model": model.keys() == MODEL.keys(),
        "class_names": 0 < len(names) == model["num_classes"]
        and all(isinstance(name, str) for name in names),
        "mean": 0 < len(mean) == model["channels"] and all(map(math.isfinite, mean)),
        "std": len(std) == len(mean) and all(math.isfinite(s) and s > 0 for s in std),
        "image_size": model["image_size"] == data["image_size"],
        "precision": info["precision"] in ("no", "bf16", "fp16"),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} does not fit the rest")


def require_types(group: Any, types: Mapping[str, type]) -> None:
    """Nothing; raises ValueError where `group` is no dict that has these."""
    for name, kind in types.items():
        if not isinstance(group, dict) or name not in group:
            raise ValueError(f"no {name}")
        if not isinstance(group[name], (int, float) if kind is float else kind):
            raise ValueError(f"{name} is not of type {kind.__name__}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file; raises `UserError` where they are not what was written."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    # The first files had none.
    if read_info(path).get("sha256", digest := checksum(tensors)) != digest:
        raise _damaged(path, ValueError("its tensors are not those that were written"))
    return tensors


def load_weights(path: Path, network: nn.Module) -> None:
    """Fills `network` from a file; raises `UserError` where it holds another architecture's."""
    tensors, expected = read_tensors(path), network.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise UserError(
            f"{path} holds the weights of another architecture: "
            + (f"it lacks {name}" if name in expected else f"{name} has no place"),
            "Give the weights of the network that its metadata names",
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path} holds the weights of another architecture: {name} is "
                f"{list(tensor.shape)}, not {list(expected[name].shape)}",
                "Give the weights of the network that its metadata names",
            )
    expected.update(tensors)  # which keeps the modules' versions: MNASNet's asks for its own
    network.load_state_dict(expected)


def require_same_classes(path: Path, about: dict[str, Any], split: Split) -> None:
    """Nothing; raises `UserError` where the data's classes or channels are not the weights'."""
    known, found = list(about["class_names"]), list(split.class_names)
    if known != found:
        other = sorted(set(known) ^ set(found))
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        missing = ", ".join(other[:5]) + more or "their order"
        raise UserError(
            f"{path} knows {len(known)} classes and the data has {len(found)}, "
            f"which differ in {missing}",
            "Give --dataset and --data-dir with the classes that it was trained on",
        )
    channels = about["model"]["channels"]
    if split.images.shape[1] != channels:
        raise UserError(
            f"{path} takes images with {channels} channels, the data's have "
            f"{split.images.shape[1]}",
            "Give data like that it was trained on",
        )


def _foreign(path: Path) -> UserError:
    return UserError(
        f"{path} is no weights file of train.py", "Give a run's folder or its best.safetensors"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    """That a file of ours is not whole any more; or that it never was one of ours."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(START)
        # Where one of the two was hit, the other is left; an empty file may have been anything.
        if len(start) > 8 and b"__metadata__" not in start and f'"{KEY}":'.encode() not in start:
            return _foreign(path)
    return UserError(f"{path} is damaged ({error})", "Train again, or give another file")
