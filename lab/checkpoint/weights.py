"""Self-describing weights files (promises P4, P5): safetensors with metadata, no pickle."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lab import console
from lab.checkpoint.atomic_io import AsyncWriter, check_types, to_json, write_atomically
from lab.checkpoint.provenance import versions
from lab.checkpoint.run_dir import BEST, RunDir
from lab.config.schema import HUB, HUB_WEIGHTS, TIMM, TrainConfig, is_on_hub
from lab.data import DataConfig
from lab.data.splits import Splits
from lab.data.types import Split, normalized
from lab.distributed import raise_on_all_ranks
from lab.errors import UserError, first_line, name_some
from lab.models import build_model, build_without_memory, find_model, own

# All metadata is one JSON text under one key: safetensors does not keep the order of several keys,
# so equal weights would not give equal bytes.
KEY = "lab"
FORMAT = 1

# The metadata that the scripts read, with their types in JSON.
METADATA_TYPES = {
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
MODEL_TYPES = {"name": str, "num_classes": int, "in_chans": int, "image_size": int}


def run_metadata(config: TrainConfig, splits: Splits, precision: str) -> dict[str, Any]:
    """Return the metadata of a run's weights, without the epoch that they come from."""
    return {
        "model": {
            "name": config.model,
            "num_classes": len(splits.train.class_names),
            "in_chans": splits.train.images.shape[1],
            "image_size": config.image_size,
        },
        "model_sha256": own.sha256(config.model),
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
        "versions": versions(*_extras(config)),
        "decoder": splits.decoder,
    }


def _extras(config: TrainConfig) -> list[str]:
    """Return the optional libraries that a run's results depend on."""
    used = {"timm": config.model.startswith(TIMM), "datasets": config.dataset.startswith(HUB)}
    return [name for name, is_used in used.items() if is_used]


class BestWeights:
    """The best.safetensors of a run, which the main process writes."""

    def __init__(self, run: RunDir, writer: AsyncWriter):
        self.run, self.writer = run, writer

    def save(self, model: nn.Module, metadata: dict[str, Any], row: dict[str, Any]) -> None:
        """Copy the weights and start to write them.

        `metadata` comes from `run_metadata`; `row` is the epoch's line of history.jsonl. No times
        are written, so that equal runs give equal files. All processes call it. Raises `UserError`
        if the weights are not finite.
        """
        # Stacked, so that the host waits for the device only once.
        if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
            raise UserError(
                f"the weights are not finite after epoch {row['epoch']}",
                "Start a new run with a lower --lr, or with --max-grad-norm 1",
            )
        if not self.run.is_main_process:
            return
        metrics = {name: value for name, value in row.items() if name.startswith("val_")}
        metadata = {**metadata, "best_epoch": row["epoch"], "metrics": metrics}
        self.writer.wait()
        with suppress(UserError):  # a damaged file is replaced
            if self.run.best.exists() and read_metadata(self.run.best)["temperature"] != 1:
                console.warn(
                    f"the weights of epoch {row['epoch']} replace calibrated ones: run "
                    "evaluate.py --calibrate again"
                )
        self.writer.submit(write_weights, self.run.best, copy_of(model), metadata)

    def load(self, accelerator: Accelerator, model: nn.Module) -> float:
        """Load the file into the model of every process, and return its temperature.

        Only the main process reads it. The temperature is not 1.0 if evaluate.py calibrated the
        weights, training was resumed, and no later epoch was better.
        """
        temperature = [1.0]
        with raise_on_all_ranks(accelerator):
            self.writer.wait()
            if self.run.is_main_process:
                load_weights(self.run.best, model)
                temperature = [read_metadata(self.run.best)["temperature"]]
        if accelerator.num_processes > 1:
            for tensor in model.state_dict().values():
                broadcast(tensor)
        return broadcast_object_list(temperature)[0]


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model, copied to the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and their metadata, which JSON can represent, to `path` atomically."""
    metadata = {"format": FORMAT, **metadata, "sha256": checksum(tensors)}
    header = {KEY: to_json(metadata, sort_keys=True)}
    # In memory first: save_file's own errors do not say that the disk is full.
    write_atomically(path, safetensors.torch.save(tensors, header))


def write_temperature(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a weights file again with the temperature of `metadata`, which divides its logits.

    `metadata` were read from the file. Raises `UserError` if it was replaced since.
    """
    tensors = read_tensors(path, metadata)
    temperature = {"temperature": metadata["temperature"]}
    write_weights(path, tensors, read_metadata(path) | temperature)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of CPU tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_weights(path: str) -> Path:
    """Return the weights file of a run directory, or `path` itself if it is a file.

    `hf://USER/NAME` or `hf://USER/NAME@REVISION` is downloaded from the Hugging Face Hub, unless it
    is in its cache. Raises `UserError` if there is no such file.
    """
    if is_on_hub(path):
        return _download(path)
    is_directory = os.path.isdir(path)  # Path.is_dir raises for a name that is too long
    file = Path(path) / BEST if is_directory else Path(path)
    try:
        if stat.S_ISREG(os.stat(file).st_mode):
            return file
    except PermissionError as error:
        raise _unreadable(file, error) from error
    except (OSError, ValueError):
        pass
    if is_directory:
        raise UserError(f"{path} contains no {BEST}", "Give the directory of a finished run")
    raise _missing(file)


def _download(url: str) -> Path:
    """Return the weights of a Hub repository that --push-to-hub created, in the Hub's cache."""
    from huggingface_hub import errors, hf_hub_download

    name, _, revision = url.removeprefix(HUB_WEIGHTS).partition("@")
    give = "Give hf://USER/NAME or hf://USER/NAME@REVISION of a repository that --push-to-hub made"
    try:
        return Path(hf_hub_download(name, BEST, revision=revision or None))
    except errors.HFValidationError as error:
        raise UserError(f"{url} is not the name of a repository", give) from error
    except errors.RepositoryNotFoundError as error:
        hint = "Check the name; if the repository is private, run hf auth login or set HF_TOKEN"
        raise UserError(f"the Hub has no repository {name} that you may read", hint) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision}", "Give one of its commits") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{url} is not in the cache of the Hub, and the Hub cannot be reached",
            "Connect to it, or unset HF_HUB_OFFLINE",
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{url} contains no {BEST}", give) from error
    except OSError as error:  # of the network or the disk
        raise UserError(f"cannot download {url} ({first_line(error)})", "Try again") from error


def read_metadata(path: Path, own_model: str = "") -> dict[str, Any]:
    """Return the metadata of a weights file. Raises `UserError` if they are damaged or missing.

    Without calibration, the key "temperature", by which logits are divided, is 1.0. `own_model` is
    the `FILE.py:FUNCTION` that the user gives for weights of such a model: it takes the place of
    the name in the metadata, which is never imported, and must have the same content.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if KEY not in header:
        raise _damaged(path, ValueError("no metadata"))
    try:
        metadata = json.loads(header[KEY])
        check_types(metadata, {"format": int})
        if metadata["format"] == FORMAT:
            _check_metadata(metadata)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        reason = error.what if isinstance(error, UserError) else error
        raise UserError(
            f"{path} has invalid metadata ({reason})", "Give a weights file that train.py wrote"
        ) from error
    if metadata["format"] != FORMAT:
        raise UserError(
            f"{path} has format {metadata['format']}, not {FORMAT}", "Use a newer version of lab"
        )
    metadata.setdefault("temperature", 1.0)
    metadata.setdefault("model_sha256", "")
    if own_model:
        own.check_same(str(path), metadata["model"]["name"], metadata["model_sha256"], own_model)
        metadata["model"]["name"] = own_model
    # In Unicode form NFC, like the names of class directories.
    metadata["class_names"] = [normalized(name) for name in metadata["class_names"]]
    return metadata


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Raise ValueError or TypeError if metadata, whose origin is unknown, are invalid."""
    check_types(metadata, METADATA_TYPES)
    architecture, data = metadata["model"], metadata["data"]
    check_types(architecture, MODEL_TYPES)
    find_model(architecture["name"])  # imports no code of FILE.py:FUNCTION
    data_config = DataConfig(**data)  # TypeError for other fields
    check_types(asdict(data_config), get_type_hints(DataConfig))
    TrainConfig(mixed_precision=metadata["precision"], **data)  # UserError for invalid values
    names, mean, std = metadata["class_names"], metadata["mean"], metadata["std"]
    temperature = metadata.get("temperature", 1.0)
    valid = {
        "model": architecture.keys() == MODEL_TYPES.keys(),
        "class_names": 0 < len(names) == architecture["num_classes"]
        and all(isinstance(name, str) for name in names)
        and len({*map(normalized, names)}) == len(names),
        "mean": 0 < len(mean) == architecture["in_chans"] and all(map(math.isfinite, mean)),
        "std": len(std) == len(mean) and all(math.isfinite(s) and s > 0 for s in std),
        "image_size": architecture["image_size"] == data["image_size"],
        "precision": metadata["precision"] in ("no", "bf16", "fp16"),
        "temperature": type(temperature) in (int, float) and 0 < temperature < math.inf,
        "decoder": isinstance(metadata.get("decoder", ""), str),
        "model_sha256": isinstance(metadata.get("model_sha256", ""), str),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise ValueError(f"{name} contradicts the rest")
    # Every name can be written to a file: UTF-8, with the surrogates of `os.fsdecode`.
    "".join(names).encode("utf-8", "surrogateescape")


def read_tensors(path: Path, metadata: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a weights file. Raises `UserError` if their checksum is wrong.

    `metadata` are what was read from the file before. A training may have replaced it since, and
    the metadata of one epoch must not be used with the tensors of another.
    """
    metadata = metadata or read_metadata(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if metadata.get("sha256", digest := checksum(tensors)) != digest:
        if read_metadata(path).get("sha256") != metadata["sha256"]:
            raise UserError(f"{path} was replaced while it was read", "Run the command again")
        raise _damaged(path, ValueError("wrong checksum of the tensors"))
    return tensors


def load_model(path: Path, metadata: Mapping[str, Any]) -> nn.Module:
    """Return the model that a weights file holds and its metadata describe, on the CPU.

    Metadata of unknown origin may ask for millions of classes: they are compared with the header
    of the file before memory is allocated. Raises `UserError` if they do not match; warns if image
    files are not decoded as in training.
    """
    if metadata.get("decoder"):
        from lab.data.decode import warn_of_other_pixels

        warn_of_other_pixels(metadata["decoder"])
    check_shapes(path, build_without_memory(**metadata["model"]))
    model = build_model(**metadata["model"])
    load_weights(path, model, metadata)
    return model


def check_shapes(path: Path, model: nn.Module) -> None:
    """Raise `UserError` if the header of a file lists other tensors than those of the model."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            if name not in shapes:
                problem = f"{name} is missing"
            elif name not in expected:
                problem = f"unexpected {name}"
            else:
                problem = f"{name} has shape {shapes[name]}, not {expected[name]}"
            raise UserError(
                f"{path} holds the weights of another architecture: {problem}",
                "Give the weights of the model that its metadata name",
            )


def load_weights(path: Path, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Load a weights file into the model; for `metadata` see `read_tensors`.

    Raises `UserError` if its architecture is another one.
    """
    check_shapes(path, model)
    state = model.state_dict()  # has the versions of modules, which MNASNet needs
    state.update(read_tensors(path, metadata))
    model.load_state_dict(state)


def align_classes(path: Path, metadata: Mapping[str, Any], split: Split) -> Split:
    """Return the split with the class names and labels of the weights in `path`.

    The data may lack some of the classes. Raises `UserError` if they have a class that the weights
    do not have, or another number of channels.
    """
    class_labels = {name: label for label, name in enumerate(metadata["class_names"])}
    unknown = [name for name in split.class_names if name not in class_labels]
    if unknown:
        raise UserError(
            f"the data have classes that {path} was not trained on: {name_some(unknown)}",
            "Give a --dataset with classes that it was trained on",
        )
    check_channels(path, metadata["model"]["in_chans"], split.images.shape[1])
    labels = torch.tensor([class_labels[name] for name in split.class_names])[split.labels]
    return replace(split, labels=labels, class_names=tuple(metadata["class_names"]))


def check_channels(path: Path, expected: int, in_chans: int) -> None:
    """Raise `UserError` if the data have another number of channels than the weights expect."""
    if in_chans != expected:
        raise UserError(
            f"{path} takes images with {expected} channels, but the data have {in_chans}",
            "Give data with that many channels",
        )


def _missing(path: Path) -> UserError:
    return UserError(f"there is no file {path}", "Give a run's directory or its best.safetensors")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path} ({error.strerror or error})",
        "Check the permissions of the file and of its directories",
    )


def _damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a file that safetensors cannot read."""
    try:  # safetensors reports every `OSError` as a missing file
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return _missing(path)
    except OSError as os_error:
        return _unreadable(path, os_error)
    return UserError(
        f"{path} is damaged, or is not a weights file of train.py ({error})",
        "Give a run's directory or its best.safetensors",
    )
