"""Training state and its checkpoints: checkpoints/step-00001234 in a run's directory (P3, P4).

  tensors.safetensors   model.NAME, ema.NAME, optimizer.SLOT.NAME with the names of the plain model
  state.json            training state, settings and best epoch; the SHA-256 of both files

Checkpoints are written atomically and can be resumed on any number of processes. They contain no
random state: sample order, augmentation and dropout follow from (seed, epoch, step, rank).
Accelerate's save_state is not used because it writes pickles, and not atomically.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lab.checkpoint.atomic_io import (
    check_types,
    os_errors_as_user_errors,
    sync,
    to_json,
    write_atomically,
)
from lab.checkpoint.run_dir import RunDir
from lab.config.schema import AUTOMATIC, TIMEOUT_SECONDS, TrainConfig, flag, is_code, is_own_dataset
from lab.data.fingerprint import changed_splits
from lab.data.splits import Splits
from lab.errors import UserError
from lab.models import own


@dataclass
class TrainState:
    """The progress of a run. With the weights and the optimizer state, all that resuming needs."""

    epoch: int = 1
    batch: int = 0  # batches completed in this epoch
    step: int = 0  # batches completed since the run started
    skipped_steps: int = 0  # in this epoch, by --on-nonfinite skip
    skipped_samples: int = 0
    seconds: float = 0.0  # spent on the batches of this epoch
    learning_rate: float = 0.0  # of the last step
    # This process's loss_sum, num_correct and number of steps with a finite loss in this epoch,
    # float32 [3].
    totals: Tensor = field(default_factory=lambda: torch.zeros(3))

    def next_epoch(self) -> "TrainState":
        """Return the state at the beginning of the next epoch."""
        return TrainState(epoch=self.epoch + 1, step=self.step)


TENSORS_FILE, METADATA_FILE = "tensors.safetensors", "state.json"
CHECKPOINT_FORMAT = 1
# The metadata that are read from state.json, with their types in JSON.
METADATA_TYPES = {
    "train_state": dict,
    "totals": list,
    "best": dict,
    "config": dict,
    "fingerprints": dict,
    "normalization": list,  # mean and standard deviation of each channel
    "precision": str,
}
# Of the training state; its totals, which differ between processes, are stored apart from it.
TRAIN_STATE_TYPES = {k: v for k, v in get_type_hints(TrainState).items() if k != "totals"}
SCALER_TYPES = {
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}

# Settings that may change when a run is resumed: where it runs, for how long, and what it writes.
MUTABLE_ON_RESUME = (
    "epochs", "max_steps", "patience", "max_hours", "on_nonfinite", "data_dir",
    "grad_accum_steps", "grad_checkpointing", "mixed_precision", "sync_bn", "deterministic",
    "compile", "cuda_graphs", "loader", "workers", "threads", "timeout_seconds", "checkpoint_every",
    "keep_checkpoints", "output_dir", "name", "resume", "log_every", "tracker", "push_to_hub",
    "quiet", "debug",
)  # fmt: skip


class CorruptCheckpointError(Exception):
    """A checkpoint is incomplete or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a run is resumed from."""

    run: RunDir
    path: Path  # of the checkpoint
    metadata: dict[str, Any]  # of state.json, updated by `lab.checkpoint.manager.latest_checkpoint`
    tensors: dict[str, Tensor]  # empty except on the process that read them

    def config(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """Return the run's settings with `overrides`. Raises `UserError` if one must not change."""
        stored = asdict(TrainConfig(**self.metadata["config"]))
        parent = overrides.get("output_dir")
        if parent and os.path.realpath(parent) != os.path.realpath(self.run.path.parent):
            raise UserError(
                f"--output-dir {parent} is not the directory of {self.run.path}, the run to resume",
                "Leave it out, or move the run first",
            )
        changed = {}
        for name, value in overrides.items():
            if name in AUTOMATIC and value == AUTOMATIC[name]:
                continue
            moved = name == "dataset" and is_own_dataset(value) and is_own_dataset(stored[name])
            if name == "model" and is_code(stored[name]) and is_code(value):
                sha256 = self.metadata.get("model_sha256", "")
                own.check_same(str(self.run.path), stored[name], sha256, value)
                moved = True
            if name in MUTABLE_ON_RESUME or moved:
                changed[name] = value
            elif name == "revision" and not re.fullmatch("[0-9a-f]{40}", value):
                continue  # a branch or tag: the run keeps the commit it began with
            elif value != stored[name]:
                raise UserError(
                    f"{flag(name)} {value} differs from the run's, which is {stored[name]}",
                    "Leave it out, or start a new run",
                )
        not_stored: dict[str, Any] = {  # as this command says, not the one that started the run
            "output_dir": str(self.run.path.parent),
            "name": self.run.path.name,
            "resume": "",
            "overwrite": False,
            "push_to_hub": overrides.get("push_to_hub", ""),
            "timeout_seconds": overrides.get("timeout_seconds", TIMEOUT_SECONDS),
            "quiet": overrides.get("quiet", False),
            "debug": overrides.get("debug", False),
        }
        config = TrainConfig(**stored | changed | not_stored)
        epoch = self.metadata["train_state"]["epoch"]
        if config.epochs < epoch:
            raise UserError(
                f"invalid --epochs {config.epochs}: the run is in epoch {epoch}",
                "Give more epochs, or leave it out",
            )
        return config

    def train_state(self, rank: int, world_size: int) -> TrainState:
        """Return the training state of one process. The totals of all processes are distributed."""
        totals = torch.tensor(self.metadata["totals"], dtype=torch.float32)  # [processes, 3]
        if len(totals) == world_size:
            totals = totals[rank].clone()
        else:  # rank 0 takes the sums of all
            num_finite = totals[:, 2].min()
            totals = totals.sum(0) * (rank == 0)
            totals[2] = num_finite
        return TrainState(**self.metadata["train_state"], totals=totals)

    def reached_limit(self, config: TrainConfig) -> str:
        """Return the option that ends the run, which was trained to its end; "" if none does."""
        if not self.metadata["has_report"]:
            return ""
        state, best = self.metadata["train_state"], self.metadata["best"]
        epoch_is_complete = state["batch"] == self.metadata.get("num_batches")
        epochs_since_best = state["epoch"] - best["epoch"] if best else 0
        if epoch_is_complete and state["epoch"] == config.epochs:
            return "--epochs"
        if epoch_is_complete and config.patience and epochs_since_best >= config.patience:
            return "--patience"
        if config.max_steps and state["step"] >= config.max_steps:
            return "--max-steps"
        return ""

    def check_same_splits(self, splits: Splits) -> None:
        """Raise `UserError` if the splits are not those that the run was trained on."""
        if changed := changed_splits(self.metadata["fingerprints"], splits.fingerprints):
            raise UserError(
                "the data differ from those that the run was trained on (files of these splits "
                f"were added, removed, renamed or replaced: {', '.join(changed)})",
                "Give the --dataset or --data-dir with the same files, or start a new run",
            )


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the tensors of a checkpoint.

    Raise `CorruptCheckpointError` if it is incomplete or damaged, `UserError` if its format is
    newer.
    """
    try:
        content = json.loads((path / METADATA_FILE).read_bytes())
        metadata = content["metadata"]
        if _sha256(_json(metadata)) != content["sha256"]:
            raise CorruptCheckpointError(f"wrong checksum of {METADATA_FILE}")
        if metadata["format"] != CHECKPOINT_FORMAT:
            raise UserError(f"{path} has format {metadata['format']}", "Use a newer version of lab")
        tensors = (path / TENSORS_FILE).read_bytes()
        if _sha256(tensors) != metadata["tensors_sha256"]:
            raise CorruptCheckpointError(f"wrong checksum of {TENSORS_FILE}")
        _check_metadata(metadata)
        return metadata, safetensors.torch.load(tensors)
    except OSError as error:
        raise CorruptCheckpointError(f"{error.filename or path}: {error.strerror}") from error
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{TENSORS_FILE}: {error}") from error
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise CorruptCheckpointError(f"invalid {METADATA_FILE} ({error!r})") from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise an error of any of several types unless metadata of unknown origin are valid.

    They may lack settings that were added later.
    """
    check_types(metadata, METADATA_TYPES)
    config, state = metadata["config"], metadata["train_state"]
    types = get_type_hints(TrainConfig)
    check_types(config, {name: types[name] for name in config})
    try:
        TrainConfig(**config)
    except UserError as error:
        raise CorruptCheckpointError(f"{METADATA_FILE}: {error}") from error
    check_types(state, TRAIN_STATE_TYPES)
    valid = {
        "config": all(
            abs(number) < 2**63 for number in config.values() if isinstance(number, int | float)
        ),
        "train_state": state.keys() == TRAIN_STATE_TYPES.keys()
        and state["epoch"] > 0
        and all(0 <= number < 2**53 for number in state.values()),
        "totals": len(metadata["totals"]) > 0
        and all(len(row) == 3 and {type(x) for x in row} == {float} for row in metadata["totals"])
        and all(0 <= row[2] < 2**53 for row in metadata["totals"]),
        "precision": metadata["precision"] in ("no", "bf16", "fp16"),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise ValueError(name)
    if metadata["scaler"] is not None:
        check_types(metadata["scaler"], SCALER_TYPES)


def _json(metadata: Mapping[str, Any]) -> bytes:
    return to_json(metadata, sort_keys=True).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary directory and rename it. Raises `UserError` on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    content = safetensors.torch.save(tensors)
    metadata = {**metadata, "tensors_sha256": _sha256(content)}
    text = to_json({"metadata": metadata, "sha256": _sha256(_json(metadata))}, indent=1)
    with os_errors_as_user_errors(path):
        try:
            temporary.mkdir()
            write_atomically(temporary / TENSORS_FILE, content)
            write_atomically(temporary / METADATA_FILE, text)
            if path.exists():  # a damaged checkpoint, or one of steps that are repeated
                shutil.rmtree(path)
            os.replace(temporary, path)
            if os.name == "posix":  # the rename is durable once the parent directory is synced
                sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def optimizer_state_shapes(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, torch.Size]]:
    """Return the shapes of the optimizer's state for each parameter, by name of the slot."""
    shapes: dict[Tensor, dict[str, torch.Size]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "betas" in group and not group.get("muon"):
                shapes[p] = {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": torch.Size()}
            else:
                shapes[p] = {"momentum_buffer": p.shape}
    return shapes
