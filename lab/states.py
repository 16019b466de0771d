"""Resumable states: state/step-00001234 in a run's folder, whole or not there (promises P3, P4).

  tensors.safetensors   network.NAME, average.NAME, optimizer.SLOT.NAME: the plain network's names
  state.json            position, settings, best epoch; the SHA-256 of both files

Nothing depends on the number of processes, and there is no random state: order, augmentation and
dropout follow from (seed, epoch, step, rank). Accelerate's own state folder is a folder of pickles,
and is not whole when a process dies while it writes.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

from lab import console
from lab.checkpoint import read_info, read_tensors, require_types
from lab.config import TIMEOUT_SECONDS, TrainConfig
from lab.data import Splits
from lab.data.fingerprint import changed_splits
from lab.engine import Position
from lab.errors import UserError
from lab.options import flag
from lab.rundir import (
    CARD,
    REPORT,
    STATES,
    RunDir,
    no_checkpoint,
    open_new,
    sync,
    to_json,
    write_atomically,
    writing,
)

TENSORS, ABOUT = "tensors.safetensors", "state.json"
FORMAT = 1
# What is read of state.json, and its types in JSON.
TYPES = {
    "position": dict,
    "sums": list,
    "best": dict,
    "config": dict,
    "fingerprints": dict,
    "precision": str,
}
POSITION = {
    "epoch": int,
    "batch": int,
    "step": int,
    "skipped_steps": int,
    "skipped_samples": int,
    "seconds": float,
    "learning_rate": float,
}
SCALER = {
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}


# A run goes on with other values of these: they change where, how long and what is kept.
RESUMABLE = (
    "epochs", "max_steps", "patience", "max_hours", "on_nonfinite", "data_dir",
    "accumulate", "mixed_precision", "sync_bn", "deterministic", "compile",  # another device's
    "cuda_graphs",
    "loader", "workers", "threads", "timeout_seconds", "save_every", "keep_states",
    "final_checkpoints", "output_dir", "name", "resume", "log_every", "tracker", "push_to_hub",
    "hub_images", "hub_public", "quiet", "debug",
)  # fmt: skip


class Damaged(Exception):
    """A state that is not what was written."""


@dataclass(frozen=True)
class State:
    """What a run goes on from, and where it lies."""

    run: RunDir
    path: Path  # of the checkpoint
    # state.json; "best": the line of history.jsonl of the best weights; and "has_report"
    about: dict[str, Any]
    tensors: dict[str, Tensor]  # empty but on the process that read them

    def config(self, given: Mapping[str, Any]) -> TrainConfig:
        """The run's settings, with those `given` that may change; `UserError` for another."""
        stored = asdict(TrainConfig(**self.about["config"]))
        for name, value in given.items():
            own = name == "image_size" and value == 0  # the model's, whichever that is
            if name not in RESUMABLE and value != stored[name] and not own:
                raise UserError(
                    f"{flag(name)} {value} is not the run's, which has {stored[name]}",
                    "Leave it out, or start a new run",
                )
        changed = {name: value for name, value in given.items() if name in RESUMABLE}
        place: dict[str, Any] = {
            "output_dir": str(self.run.path.parent), "name": self.run.path.name, "resume": "",
        }  # fmt: skip
        # An upload is never repeated because a file says so.
        place["push_to_hub"] = given.get("push_to_hub", "")
        place |= {name: given.get(name, False) for name in ("hub_images", "hub_public")}
        place["timeout_seconds"] = given.get("timeout_seconds", TIMEOUT_SECONDS)  # of this world
        config = TrainConfig(**stored | changed | place)
        if config.epochs < self.about["position"]["epoch"]:
            raise UserError(
                f"--epochs {config.epochs}: the run is in epoch {self.about['position']['epoch']}",
                "Give more, or leave it out",
            )
        return config

    def position(self, rank: int, world_size: int) -> Position:
        """The position, for one of the processes; its sums are a part of them all."""
        sums = torch.tensor(self.about["sums"], dtype=torch.float32)  # [processes, 3]
        if len(sums) == world_size:
            mine = sums[rank]
        else:  # the losses and hits of all go to the first
            mine = sums.sum(0) * (rank == 0)
            mine[2] = sums[:, 2].min()
        return Position(**self.about["position"], sums=mine.clone())

    def is_finished(self, config: TrainConfig) -> bool:
        """Return whether the run has all its files and `config` trains it no further."""
        position, best = self.about["position"], self.about["best"]
        epoch_is_whole = position["batch"] == self.about.get("num_batches")
        waited = position["epoch"] - best["epoch"] if best else 0
        return self.about["has_report"] and bool(
            (config.max_steps and position["step"] >= config.max_steps)
            or (epoch_is_whole and position["epoch"] == config.epochs)
            or (epoch_is_whole and config.patience and waited >= config.patience)
        )

    def require_same_data(self, splits: Splits) -> None:
        """Nothing; raises `UserError` where other samples lie where the run's lay."""
        if changed := changed_splits(self.about["fingerprints"], splits.fingerprints):
            raise UserError(
                "the data are not those that the run was trained on (files of these splits were "
                f"added, removed, renamed or replaced: {', '.join(changed)})",
                "Give --data-dir with the same files, or start a new run",
            )


@contextmanager
def open_run(config: TrainConfig, writes: bool) -> Iterator[tuple[RunDir, State | None]]:
    """Lock the directory of the run that `config` starts or resumes, for as long as it trains.

    Yield it and the checkpoint to resume from, None for a new run. Nothing is decided before the
    lock is held, and nothing is removed before `RunDir.begin`. Off the process that `writes` there
    is no lock and no checkpoint. Raise `UserError` where the directory cannot be made, another
    training is at work in it, it may not be replaced, or no checkpoint in it is intact.
    """
    if not writes:
        yield RunDir("", writes=False), None
        return
    if config.resume in ("", "auto"):
        run = open_new(config)
    else:
        run = RunDir(_folder_of(config.resume))
        if not os.path.isdir(run.path):  # Path.is_dir raises for a name that is too long
            raise UserError(f"there is no run {run.path}", "Give --resume the folder of a run")
        if not run.checkpoints:
            raise no_checkpoint(run)
        run.lock()
    try:
        yield run, _newest(run) if config.resume and run.checkpoints else None
    finally:
        run.close()


def _folder_of(path: str) -> Path:
    """A run's folder, also where one of its states is named."""
    named = Path(path)
    return named.parents[1] if named.parent.name == STATES else named


def share(state: State | None) -> State | None:
    """Return what the main process found on every process; the tensors stay with it."""
    found = (state.about, str(state.run.path), str(state.path)) if state else None
    found = broadcast_object_list([found])[0]
    if state or not found:
        return state
    about, run, path = found
    return State(RunDir(run, writes=False), Path(path), about, {})


def _newest(run: RunDir) -> State:
    damaged = []
    for folder in run.checkpoints:
        try:
            about, tensors = read(folder)
        except Damaged as error:
            console.warn(f"the state {folder} is damaged ({error})")
            damaged.append(folder)
            continue
        about["best"] = _best(run, about)
        # The card is the last file that is written of a finished run.
        about["has_report"] = all((run.path / name).exists() for name in (REPORT, CARD))
        for leftover in (*damaged, *run.states.glob(".step-*")):  # of writers that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        return State(run, folder, about, tensors)
    raise UserError(f"no state of {run.path} is whole", "Start a new run")


def _best(run: RunDir, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of the epoch whose weights best.safetensors holds.

    Empty where it is not one of the epochs before the checkpoint's: its line of history.jsonl is
    cut, and that epoch, of which perhaps only a part was evaluated, is evaluated again.
    """
    best = about["best"]
    if not best and not run.best.exists():
        return {}
    try:
        info = read_info(run.best)
        read_tensors(run.best)  # else the run's end would be the first to see that they are damaged
        # Metrics that are not finite are null there.
        kept = {k: math.nan if v is None else v for k, v in info["metrics"].items()}
        require_types(kept, {f"val_{about['config']['select_by']}": float})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        console.warn(f"{error} The best epoch is chosen anew.")
        return {}
    before = info["best_epoch"] < about["position"]["epoch"]
    return {**kept, "epoch": info["best_epoch"]} if before else {}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state.json, tensors) of a state; raises `Damaged`. Of pickles nothing is read."""
    try:
        written = json.loads((folder / ABOUT).read_bytes())
        about = written["state"]
        if _digest(_json(about)) != written["sha256"]:
            raise Damaged(f"{ABOUT} is not what was written")
        if about["format"] != FORMAT:
            raise UserError(f"{folder} has format {about['format']}", "Use a newer version of lab")
        content = (folder / TENSORS).read_bytes()
        if _digest(content) != about["tensors_sha256"]:
            raise Damaged(f"{TENSORS} is not what was written")
        _require_usable(about)
        return about, safetensors.torch.load(content)
    except OSError as error:
        raise Damaged(f"{error.filename or folder}: {error.strerror}") from error
    except SafetensorError as error:
        raise Damaged(f"{TENSORS}: {error}") from error
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(f"{ABOUT} does not say what it has to ({error!r})") from error


def _require_usable(about: Mapping[str, Any]) -> None:
    """Nothing; raises where state.json, which may be a stranger's, is not as `lab.keeper` makes it.

    It may lack settings that came later.
    """
    require_types(about, TYPES)
    config, position = about["config"], about["position"]
    types = get_type_hints(TrainConfig)
    require_types(config, {name: types[name] for name in config})
    try:
        TrainConfig(**config)
    except UserError as error:
        raise Damaged(f"{ABOUT}: {error}") from error
    require_types(position, POSITION)
    fits = {
        "config": all(
            abs(number) < 2**63 for number in config.values() if isinstance(number, int | float)
        ),
        "position": position.keys() == POSITION.keys()
        and position["epoch"] > 0
        and all(0 <= number < 2**53 for number in position.values()),
        "sums": len(about["sums"]) > 0
        and all(len(row) == 3 and {type(x) for x in row} == {float} for row in about["sums"])
        and all(0 <= row[2] < 2**53 for row in about["sums"]),
        "precision": about["precision"] in ("no", "bf16", "fp16"),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(name)
    if about["scaler"] is not None:
        require_types(about["scaler"], SCALER)


def _json(about: Mapping[str, Any]) -> bytes:
    return to_json(about, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a state: to a temporary folder, which then takes its name. Raises `UserError`."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    content = safetensors.torch.save(tensors)
    about = {**about, "tensors_sha256": _digest(content)}
    text = to_json({"state": about, "sha256": _digest(_json(about))}, indent=1)
    with writing(folder):
        try:
            temporary.mkdir()
            write_atomically(temporary / TENSORS, lambda path: path.write_bytes(content))
            write_atomically(temporary / ABOUT, lambda path: path.write_text(text))
            if folder.exists():  # what was there was damaged, or of steps that are done again
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            if os.name == "posix":  # a rename is on disk once its folder is
                sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
