"""Weights files that describe themselves (promises P4, P5): safetensors, no pickle."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lab.checkpoint.atomic_io import AsyncWriter, to_json, write_atomically
from lab.checkpoint.provenance import versions
from lab.checkpoint.run_dir import BEST, RunDir
from lab.config.schema import TrainConfig
from lab.data import DataConfig, Splits, find_dataset
from lab.data.types import Split, normalized
from lab.distributed import raise_on_all_ranks
from lab.errors import UserError, name_some
from lab.models import build_model, find_model

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
    "selection_split": str,
}
MODEL = {"name": str, "num_classes": int, "in_chans": int, "image_size": int}


def run_metadata(config: TrainConfig, splits: Splits, precision: str) -> dict[str, Any]:
    """All that is needed to use the weights of a run, but for the epoch that they come from."""
    return {
        "model": {
            "name": config.model,
            "num_classes": len(splits.train.class_names),
            "in_chans": splits.train.images.shape[1],
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
        "monitor": config.monitor,
        "selection_split": splits.selection_split,
        "versions": versions(),
    }


class BestWeights:
    """A run's best.safetensors, written by the main process."""

    def __init__(self, run: RunDir, writer: AsyncWriter):
        self.run, self.writer = run, writer

    def save(self, model: nn.Module, metadata: dict[str, Any], row: dict[str, Any]) -> None:
        """Takes a copy of the weights and begins to write it.

        The metadata is `about` the run, and the epoch that the weights are of: `row`, its line of
        history.jsonl. Times stay out, so that equal runs give equal files.
        """
        if not self.run.is_main_process:
            return
        metrics = {name: value for name, value in row.items() if name.startswith("val_")}
        metadata = {**metadata, "best_epoch": row["epoch"], "metrics": metrics}
        self.writer.wait()
        self.writer.submit(write_weights, self.run.best, copy_of(model), metadata)

    def load(self, accelerator: Accelerator, model: nn.Module) -> None:
        """Fills `network` on every process from the file, which only the main one need see."""
        with raise_on_all_ranks(accelerator):
            self.writer.wait()
            if self.run.is_main_process:
                load_weights(self.run.best, model)
        if accelerator.num_processes > 1:
            for tensor in model.state_dict().values():
                broadcast(tensor)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """The plain network's tensors, copied to the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and `info` (JSON-able) to `path`, whole or not at all."""
    metadata = {"format": FORMAT, **metadata, "sha256": checksum(tensors)}
    header = {KEY: to_json(metadata, sort_keys=True)}
    # In memory first: save_file's own errors do not say that the disk is full.
    content = safetensors.torch.save(tensors, header)
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
    folder = os.path.isdir(path)  # Path.is_dir raises for a name that is too long
    found = Path(path) / BEST if folder else Path(path)
    try:
        if stat.S_ISREG(os.stat(found).st_mode):
            return found
    except PermissionError as error:
        raise _unreadable(found, error) from error
    except (OSError, ValueError):
        pass
    if folder:
        raise UserError(f"{path} holds no {BEST}", "Give the folder of a finished run")
    raise _missing(found)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a weights file. Raises `UserError` for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if KEY not in header:
        raise _foreign(path)
    try:
        metadata = json.loads(header[KEY])
        check_types(metadata, {"format": int})
        if metadata["format"] == FORMAT:
            _check_metadata(metadata)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        reason = error.what if isinstance(error, UserError) else error
        raise UserError(
            f"{path} does not say what network it holds ({reason})",
            "Give a file that train.py wrote",
        ) from error
    if metadata["format"] != FORMAT:
        raise UserError(
            f"{path} has format {metadata['format']}, not {FORMAT}", "Use a newer version of lab"
        )
    # As class folders are listed; earlier versions kept the form that the file system had.
    metadata["class_names"] = [normalized(name) for name in metadata["class_names"]]
    return metadata


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Nothing; raises where metadata, which may be a stranger's, is not as `about_run` makes it."""
    check_types(metadata, ABOUT)
    architecture, data = metadata["model"], metadata["data"]
    check_types(architecture, MODEL)
    find_model(architecture["name"])
    check_types(asdict(DataConfig(**data)), get_type_hints(DataConfig))  # older files lack fields
    find_dataset(data["dataset"])
    TrainConfig(mixed_precision=metadata["precision"], **data)  # checks bounds and choices
    names, mean, std = metadata["class_names"], metadata["mean"], metadata["std"]
    fits = {
        "model": architecture.keys() == MODEL.keys(),
        "class_names": 0 < len(names) == architecture["num_classes"]
        and all(isinstance(name, str) for name in names),
        "mean": 0 < len(mean) == architecture["in_chans"] and all(map(math.isfinite, mean)),
        "std": len(std) == len(mean) and all(math.isfinite(s) and s > 0 for s in std),
        "image_size": architecture["image_size"] == data["image_size"],
        "precision": metadata["precision"] in ("no", "bf16", "fp16"),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} does not fit the rest")
    # Every name can be written to a file: it is UTF-8, or holds bytes as `os.fsdecode` keeps them.
    "".join(names).encode("utf-8", "surrogateescape")


def check_types(group: Any, types: Mapping[str, type]) -> None:
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
    if read_metadata(path).get("sha256", digest := checksum(tensors)) != digest:
        raise _damaged(path, ValueError("its tensors are not those that were written"))
    return tensors


def load_model(path: Path, metadata: Mapping[str, Any]) -> nn.Module:
    """Return the model that a weights file holds and its metadata `info` describes, on the CPU.

    The metadata may come from a stranger and name millions of classes: it is compared with the
    file's header before a tensor is allocated. Raises `UserError` if they do not match.
    """
    with torch.device("meta"):
        check_shapes(path, build_model(**metadata["model"]))
    model = build_model(**metadata["model"])
    load_weights(path, model)
    return model


def check_shapes(path: Path, model: nn.Module) -> None:
    """Raise `UserError` unless the tensors that a file's header lists are those of `model`."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            if name not in found:
                problem = f"it lacks {name}"
            elif name not in expected:
                problem = f"{name} has no place"
            else:
                problem = f"{name} is {found[name]}, not {expected[name]}"
            raise UserError(
                f"{path} holds the weights of another architecture: {problem}",
                "Give the weights of the network that its metadata names",
            )


def load_weights(path: Path, model: nn.Module) -> None:
    """Fills `network` from a file; raises `UserError` where it holds another architecture's."""
    check_shapes(path, model)
    state = model.state_dict()
    state.update(
        read_tensors(path)
    )  # which keeps the modules' versions: MNASNet's asks for its own
    model.load_state_dict(state)


def align_classes(path: Path, metadata: Mapping[str, Any], split: Split) -> Split:
    """Return the split with the classes, and so the labels, of the weights in `path`.

    Its data may lack some of them. Raises `UserError` for classes that the weights do not know, and
    for another number of channels.
    """
    known = {name: label for label, name in enumerate(metadata["class_names"])}
    unknown = [name for name in split.class_names if name not in known]
    if unknown:
        raise UserError(
            f"the data has classes that {path} does not know: {name_some(unknown)}",
            "Give --dataset and --data-dir with classes that it was trained on",
        )
    in_chans = metadata["model"]["in_chans"]
    if split.images.shape[1] != in_chans:
        raise UserError(
            f"{path} takes images with {in_chans} channels, the data's have "
            f"{split.images.shape[1]}",
            "Give data like that it was trained on",
        )
    labels = torch.tensor([known[name] for name in split.class_names])[split.labels]
    return replace(split, labels=labels, class_names=tuple(metadata["class_names"]))


def _foreign(path: Path) -> UserError:
    return UserError(
        f"{path} is no weights file of train.py", "Give a run's folder or its best.safetensors"
    )


def _missing(path: Path) -> UserError:
    return UserError(f"there is no file {path}", "Give a run's folder or its best.safetensors")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path} ({error.strerror or error})",
        "Check the permissions of the file and of its folders",
    )


def _damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a file that `safetensors` refused: unreadable, foreign or damaged."""
    try:  # safetensors reports every refusal of the operating system as a missing file
        with open(path, "rb") as file:
            start = file.read(START)
    except FileNotFoundError:
        return _missing(path)
    except OSError as refusal:
        return _unreadable(path, refusal)
    # Where one of the two was hit, the other is left; an empty file may have been anything.
    if len(start) > 8 and b"__metadata__" not in start and f'"{KEY}":'.encode() not in start:
        return _foreign(path)
    return UserError(f"{path} is damaged ({error})", "Train again, or give another file")
