"""Resumable states: state/step-00001234 in a run's folder, whole or not there (promises P3, P4).

  tensors.safetensors   network.NAME, average.NAME, optimizer.SLOT.NAME: the plain network's names
  state.json            position, settings, best epoch; the SHA-256 of both files

Nothing depends on the number of processes, and there is no random state: order, augmentation and
dropout follow from (seed, epoch, step, rank). Accelerate's own state folder is a folder of pickles,
and is not whole when a process dies while it writes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lab.checkpoint.atomic_io import os_errors_as_user_errors, sync, to_json, write_atomically
from lab.checkpoint.run_dir import RunDir
from lab.checkpoint.weights import check_types
from lab.config.schema import TIMEOUT_SECONDS, TrainConfig, flag
from lab.data import Splits
from lab.data.fingerprint import changed_splits
from lab.errors import UserError


@dataclass
class TrainState:
    """How far a run is; with the weights and the optimizer, all that it goes on from."""

    epoch: int = 1
    batch: int = 0  # batches done of that epoch
    step: int = 0  # batches done since the run began
    skipped_steps: int = 0  # of this epoch's, by `on_nonfinite`
    skipped_samples: int = 0
    seconds: float = 0.0  # spent on the epoch's batches
    learning_rate: float = 0.0  # of the last step
    # The epoch's sum of losses, of hits, and of steps with a finite loss; float32, this process's.
    totals: Tensor = field(default_factory=lambda: torch.zeros(3))

    def next_epoch(self) -> "TrainState":
        """The beginning of the epoch that follows."""
        return TrainState(epoch=self.epoch + 1, step=self.step)


TENSORS_FILE, METADATA_FILE = "tensors.safetensors", "state.json"
CHECKPOINT_FORMAT = 1
# What is read of state.json, and its types in JSON.
METADATA_TYPES = {
    "train_state": dict,
    "totals": list,
    "best": dict,
    "config": dict,
    "fingerprints": dict,
    "precision": str,
}
TRAIN_STATE_TYPES = {
    "epoch": int,
    "batch": int,
    "step": int,
    "skipped_steps": int,
    "skipped_samples": int,
    "seconds": float,
    "learning_rate": float,
}
SCALER_TYPES = {
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}


# A run goes on with other values of these: they change where, how long and what is kept.
MUTABLE_ON_RESUME = (
    "epochs", "max_steps", "patience", "max_hours", "on_nonfinite", "data_dir",
    "grad_accum_steps", "mixed_precision", "sync_bn", "deterministic", "compile",  # another device's
    "cuda_graphs",
    "loader", "workers", "threads", "timeout_seconds", "checkpoint_every", "keep_checkpoints",
    "final_checkpoints", "output_dir", "name", "resume", "log_every", "tracker", "push_to_hub",
    "hub_images", "hub_public", "quiet", "debug",
)  # fmt: skip


class CorruptCheckpointError(Exception):
    """A state that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from, and where it lies."""

    run: RunDir
    path: Path  # of the checkpoint
    # state.json; "best": the line of history.jsonl of the best weights; and "has_report"
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]  # empty but on the process that read them

    def config(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """The run's settings, with those `given` that may change; `UserError` for another."""
        stored = asdict(TrainConfig(**self.metadata["config"]))
        for name, value in overrides.items():
            own = name == "image_size" and value == 0  # the model's, whichever that is
            if name not in MUTABLE_ON_RESUME and value != stored[name] and not own:
                raise UserError(
                    f"{flag(name)} {value} is not the run's, which has {stored[name]}",
                    "Leave it out, or start a new run",
                )
        changed = {name: value for name, value in overrides.items() if name in MUTABLE_ON_RESUME}
        place: dict[str, Any] = {
            "output_dir": str(self.run.path.parent), "name": self.run.path.name, "resume": "",
        }  # fmt: skip
        # An upload is never repeated because a file says so.
        place["push_to_hub"] = overrides.get("push_to_hub", "")
        place |= {name: overrides.get(name, False) for name in ("hub_images", "hub_public")}
        place["timeout_seconds"] = overrides.get(
            "timeout_seconds", TIMEOUT_SECONDS
        )  # of this world
        config = TrainConfig(**stored | changed | place)
        if config.epochs < self.metadata["train_state"]["epoch"]:
            raise UserError(
                f"--epochs {config.epochs}: the run is in epoch {self.metadata['position']['epoch']}",
                "Give more, or leave it out",
            )
        return config

    def train_state(self, rank: int, world_size: int) -> TrainState:
        """The position, for one of the processes; its sums are a part of them all."""
        totals = torch.tensor(self.metadata["totals"], dtype=torch.float32)  # [processes, 3]
        if len(totals) == world_size:
            mine = totals[rank]
        else:  # the losses and hits of all go to the first
            mine = totals.sum(0) * (rank == 0)
            mine[2] = totals[:, 2].min()
        return TrainState(**self.metadata["train_state"], totals=mine.clone())

    def is_finished(self, config: TrainConfig) -> bool:
        """Return whether the run has all its files and `config` trains it no further."""
        position, best = self.metadata["train_state"], self.metadata["best"]
        epoch_is_whole = position["batch"] == self.metadata.get("num_batches")
        waited = position["epoch"] - best["epoch"] if best else 0
        return self.metadata["has_report"] and bool(
            (config.max_steps and position["step"] >= config.max_steps)
            or (epoch_is_whole and position["epoch"] == config.epochs)
            or (epoch_is_whole and config.patience and waited >= config.patience)
        )

    def check_same_splits(self, splits: Splits) -> None:
        """Nothing; raises `UserError` where other samples lie where the run's lay."""
        if changed := changed_splits(self.metadata["fingerprints"], splits.fingerprints):
            raise UserError(
                "the data are not those that the run was trained on (files of these splits were "
                f"added, removed, renamed or replaced: {', '.join(changed)})",
                "Give --data-dir with the same files, or start a new run",
            )


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state.json, tensors) of a state; raises `Damaged`. Of pickles nothing is read."""
    try:
        written = json.loads((folder / METADATA_FILE).read_bytes())
        metadata = written["state"]
        if _digest(_json(metadata)) != written["sha256"]:
            raise CorruptCheckpointError(f"{METADATA_FILE} is not what was written")
        if metadata["format"] != CHECKPOINT_FORMAT:
            raise UserError(
                f"{folder} has format {metadata['format']}", "Use a newer version of lab"
            )
        content = (folder / TENSORS_FILE).read_bytes()
        if _digest(content) != metadata["tensors_sha256"]:
            raise CorruptCheckpointError(f"{TENSORS_FILE} is not what was written")
        _check_metadata(metadata)
        return metadata, safetensors.torch.load(content)
    except OSError as error:
        raise CorruptCheckpointError(f"{error.filename or folder}: {error.strerror}") from error
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{TENSORS_FILE}: {error}") from error
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise CorruptCheckpointError(
            f"{METADATA_FILE} does not say what it has to ({error!r})"
        ) from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Nothing; raises where state.json, which may be a stranger's, is not as `lab.checkpoint.manager` makes it.

    It may lack settings that came later.
    """
    check_types(metadata, METADATA_TYPES)
    config, position = metadata["config"], metadata["train_state"]
    types = get_type_hints(TrainConfig)
    check_types(config, {name: types[name] for name in config})
    try:
        TrainConfig(**config)
    except UserError as error:
        raise CorruptCheckpointError(f"{METADATA_FILE}: {error}") from error
    check_types(position, TRAIN_STATE_TYPES)
    fits = {
        "config": all(
            abs(number) < 2**63 for number in config.values() if isinstance(number, int | float)
        ),
        "train_state": position.keys() == TRAIN_STATE_TYPES.keys()
        and position["epoch"] > 0
        and all(0 <= number < 2**53 for number in position.values()),
        "totals": len(metadata["totals"]) > 0
        and all(len(row) == 3 and {type(x) for x in row} == {float} for row in metadata["totals"])
        and all(0 <= row[2] < 2**53 for row in metadata["totals"]),
        "precision": metadata["precision"] in ("no", "bf16", "fp16"),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(name)
    if metadata["scaler"] is not None:
        check_types(metadata["scaler"], SCALER_TYPES)


def _json(metadata: Mapping[str, Any]) -> bytes:
    return to_json(metadata, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a state: to a temporary folder, which then takes its name. Raises `UserError`."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    content = safetensors.torch.save(tensors)
    metadata = {**metadata, "tensors_sha256": _digest(content)}
    text = to_json({"state": metadata, "sha256": _digest(_json(metadata))}, indent=1)
    with os_errors_as_user_errors(folder):
        try:
            temporary.mkdir()
            write_atomically(temporary / TENSORS_FILE, lambda path: path.write_bytes(content))
            write_atomically(temporary / METADATA_FILE, lambda path: path.write_text(text))
            if folder.exists():  # what was there was damaged, or of steps that are done again
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            if os.name == "posix":  # a rename is on disk once its folder is
                sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def optimizer_state_shapes(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, torch.Size]]:
    """What the optimizer keeps of each parameter that it trains: slots and their shapes."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "betas" in group and not group.get("muon"):
                found[p] = {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": torch.Size()}
            else:
                found[p] = {"momentum_buffer": p.shape}
    return found
