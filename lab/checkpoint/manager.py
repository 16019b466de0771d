"""Start or resume a run, and write, restore and remove its checkpoints."""

import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from lab import console
from lab.checkpoint.atomic_io import AsyncWriter, check_free_space, check_types
from lab.checkpoint.interrupt import InterruptHandler, StopReason
from lab.checkpoint.run_dir import CHECKPOINTS, RunDir, no_checkpoint, open_new
from lab.checkpoint.train_state import (
    CHECKPOINT_FORMAT,
    TRAIN_STATE_TYPES,
    Checkpoint,
    CorruptCheckpointError,
    TrainState,
    optimizer_state_shapes,
    read_checkpoint,
    write_checkpoint,
)
from lab.checkpoint.weights import copy_of, read_metadata, read_tensors
from lab.config.schema import TrainConfig
from lab.data.splits import Splits
from lab.distributed import raise_on_all_ranks
from lab.errors import UserError
from lab.models import own


@contextmanager
def open_run(
    config: TrainConfig, overrides: Mapping[str, Any], world: PartialState
) -> Iterator[tuple[RunDir, TrainConfig, Checkpoint | None]]:
    """Lock the directory of the run that `config` starts or resumes, for as long as it trains.

    Yields the directory, the settings (for a resumed run its own, changed by `overrides`), and the
    checkpoint to resume from, or None for a new run. All processes call it together; the main
    process alone holds the lock and the checkpoint's tensors.

    Whether a run is new is decided while the lock is held, and nothing is deleted before
    `RunDir.create`. Raises `UserError` on all processes if the directory cannot be created, another
    process trains in it, it must not be replaced, or none of its checkpoints is complete.
    """
    run, checkpoint = RunDir("", is_main_process=False), None
    try:
        with raise_on_all_ranks(world):
            if world.is_main_process:
                run, resumable = _lock_run(config)
                checkpoint = latest_checkpoint(run) if resumable else None
        run, checkpoint = _broadcast(run, checkpoint)
        if checkpoint:
            config = checkpoint.config(overrides)
        yield run, config, checkpoint
    finally:
        run.close()


def _lock_run(config: TrainConfig) -> tuple[RunDir, bool]:
    """Return the locked directory that `config` names, and whether it holds a run to resume."""
    if config.resume in ("", "auto"):
        run = open_new(config)
        return run, bool(config.resume and (run.checkpoints or run.is_finished))
    path = Path(config.resume)
    run = RunDir(path.parents[1] if path.parent.name == CHECKPOINTS else path)
    if not os.path.isdir(run.path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"there is no run {run.path}", "Give --resume the directory of a run")
    if not run.checkpoints:
        raise no_checkpoint(run)
    if path != run.path and path.name != run.checkpoints[0].name:
        raise UserError(
            f"{path} is not the newest checkpoint of its run, from which a run is resumed",
            f"Give --resume {run.path}; to go back, delete the newer checkpoints first",
        )
    run.lock()
    return run, True


def _broadcast(run: RunDir, checkpoint: Checkpoint | None) -> tuple[RunDir, Checkpoint | None]:
    """Return the main process's run and checkpoint, on the other processes without its tensors."""
    content = (str(checkpoint.path), checkpoint.metadata) if checkpoint else None
    run_path, content = broadcast_object_list([str(run.path), content])
    if run.is_main_process:
        return run, checkpoint
    run = RunDir(run_path, is_main_process=False)
    if content is None:
        return run, None
    checkpoint_path, metadata = content
    return run, Checkpoint(run, Path(checkpoint_path), metadata, {})


def latest_checkpoint(run: RunDir) -> Checkpoint:
    """Return the newest complete checkpoint of a run, and delete damaged and temporary ones.

    Its metadata get two more keys: "best", the metrics of the epoch in best.safetensors, and
    "has_report". Raises `UserError` if no checkpoint is complete.
    """
    if not run.checkpoints:
        raise no_checkpoint(run)
    damaged = []
    for path in run.checkpoints:
        try:
            metadata, tensors = read_checkpoint(path)
        except CorruptCheckpointError as error:
            console.warn(f"the checkpoint {path} is damaged ({error})")
            damaged.append(path)
            continue
        metadata["best"] = _best_metrics(run, metadata)
        metadata["has_report"] = run.is_finished
        temporary = run.checkpoints_dir.glob(".step-*")  # left by processes that were killed
        for leftover in (*damaged, *temporary):
            shutil.rmtree(leftover, ignore_errors=True)
        return Checkpoint(run, path, metadata, tensors)
    raise UserError(f"no checkpoint of {run.path} is complete", "Start a new run")


def _best_metrics(run: RunDir, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of the epoch whose weights best.safetensors holds.

    Empty unless that epoch comes before the checkpoint's. Otherwise its line of history.jsonl will
    be removed and the epoch, of which perhaps only a part was trained, will be evaluated again.
    """
    if not metadata["best"] and not run.best.exists():
        return {}
    try:
        weights_metadata = read_metadata(run.best)
        read_tensors(run.best)  # or only the end of the run would find that they are damaged
        # Metrics that are not finite are null in the file.
        metrics = {k: math.nan if v is None else v for k, v in weights_metadata["metrics"].items()}
        check_types(metrics, {f"val_{metadata['config']['monitor']}": float, "val_loss": float})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        console.warn(f"{error} The best epoch is selected again.")
        return {}
    epoch = weights_metadata["best_epoch"]
    return {**metrics, "epoch": epoch} if epoch < metadata["train_state"]["epoch"] else {}


def begin_run(
    run: RunDir, train_step: "TrainStep", checkpoint: Checkpoint | None, settings: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Write the first files of a run, or restore a checkpoint to resume it from.

    Return the training state, and the metrics of the best epoch so far. Raises `UserError` if the
    checkpoint does not fit or a file cannot be written.
    """
    if checkpoint is None:
        _check_room(train_step)
        run.create(settings)
        return TrainState(), {}
    state = restore(train_step, checkpoint)
    run.resume(settings, state.epoch, state.step)
    console.info(f"resuming from {checkpoint.path}")
    return state, checkpoint.metadata["best"]


class TrainStep(Protocol):
    """Name the attributes of `lab.engine.training.TrainStep` that a checkpoint stores."""

    accelerator: Any
    config: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Any


class CheckpointManager:
    """Write checkpoints while a run trains, and stop it when it was interrupted.

    It is a context manager: at the end it waits until all files are written.
    """

    def __init__(
        self,
        run: RunDir,
        writer: AsyncWriter,
        interrupts: InterruptHandler,
        train_step: TrainStep,
        splits: Splits,
        saved_step: int,
    ):
        """Prepare to write; `saved_step` is the step of the newest checkpoint, 0 without one."""
        self.run, self.writer = run, writer
        self.interrupts, self.train_step = interrupts, train_step
        self.fingerprints, self.num_samples = splits.fingerprints, len(splits.train.labels)
        self.normalization = [splits.mean, splits.std]
        self.first_step = self.saved_step = saved_step
        self.stop_reason: StopReason | None = None

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Wait for pending writes; add the newest checkpoint to the hint of a `UserError`."""
        with suppress(UserError) if error else nullcontext():
            self.writer.wait()  # before the directory is unlocked
        if isinstance(error, UserError) and (checkpoint := self._newest_checkpoint()):
            error.hint += f". The last complete checkpoint of the run is {checkpoint}"

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint, or None without one; only the main process may read it."""
        return next(iter(self.run.checkpoints), None) if self.run.is_main_process else None

    def report_interruption(self) -> None:
        """Print how to resume the run that was interrupted, and set the run's exit code."""
        assert self.stop_reason is not None
        # A launcher ends the other processes when one ends: not before the checkpoint is written.
        self.train_step.accelerator.wait_for_everyone()
        why = self.stop_reason.description
        command = shlex.join(["python", "train.py", "--resume", str(self.run.path)])
        if checkpoint := self._newest_checkpoint():
            step = int(checkpoint.name.removeprefix("step-"))
            if self.saved_step == self.first_step:  # no checkpoint has this call's settings
                command = "the same command"
            console.warn(f"stopped ({why}) after step {step}; resume with: {command}")
        else:
            console.warn(f"stopped ({why}), and no checkpoint could be written")
        self.run.interrupted, self.run.exit_code = True, self.stop_reason.exit_code

    def after_step(self, best: Mapping[str, Any], state: TrainState) -> bool:
        """Save a checkpoint if one is due; return whether all processes stop now."""
        every = self.train_step.config.checkpoint_every
        self.stop_reason = self.interrupts.stop_reason(state.step)
        if self.stop_reason or (every and state.step % every == 0):
            self.save(best, state)
        return self.stop_reason is not None

    def after_epoch(self, state: TrainState) -> bool:
        """Return whether all processes stop now; the checkpoint of the epoch was saved before."""
        self.stop_reason = self.interrupts.stop_reason(state.step, check_now=True)
        return self.stop_reason is not None

    def save(self, best: Mapping[str, Any], state: TrainState) -> None:
        """Copy the training state and start to write it; all processes call it together.

        If it cannot be written, a warning says so, the run continues and older checkpoints stay.
        """
        if state.step == self.saved_step:
            return
        self.saved_step = state.step
        accelerator, config = self.train_step.accelerator, self.train_step.config
        totals = accelerator.gather(state.totals.to(accelerator.device)).view(-1, 3).tolist()
        if not self.run.is_main_process:
            return
        self.writer.wait()
        metadata = {
            "format": CHECKPOINT_FORMAT,
            "num_batches": -(-self.num_samples // config.batch_size),  # of an epoch
            "train_state": {name: getattr(state, name) for name in TRAIN_STATE_TYPES},
            "totals": totals,
            "best": dict(best),
            "config": asdict(config),
            "fingerprints": self.fingerprints,
            "normalization": self.normalization,
            "model_sha256": own.sha256(config.model),
            "precision": accelerator.mixed_precision,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        self.writer.submit(self._write, state_dict(self.train_step), metadata)

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        path = self.run.checkpoints_dir / f"step-{metadata['train_state']['step']:08}"
        names = [f"model.{name}" for name, _ in self.train_step.model.named_parameters()]
        values = [torch.tensor(metadata["totals"]), *(tensors[name] for name in names)]
        if not all(bool(value.isfinite().all()) for value in values):
            console.warn(f"{path} is not written: the weights or the losses are not finite")
            return
        try:
            check_free_space(self.run.checkpoints_dir, sum(t.nbytes for t in tensors.values()))
            self.run.sync_lines()
            write_checkpoint(path, tensors, metadata)
        except (UserError, OSError) as error:
            console.warn(f"{path} is not written: {error}")
            return
        remove_checkpoints(self.run, self.train_step.config.keep_checkpoints)


def remove_checkpoints(run: RunDir, keep: int) -> None:
    """Remove all checkpoints of a run but the newest `keep`; warn if one cannot be removed."""
    for path in run.checkpoints[keep:] if run.is_main_process else ():
        temporary = path.with_name(f".{path.name}")
        try:
            os.replace(path, temporary)  # so that no incomplete one has the name of a checkpoint
            shutil.rmtree(temporary)
        except OSError as error:
            console.warn(f"{path} is not removed: {error}")


def state_dict(train_step: TrainStep) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, copied to the CPU.

    Keys are model.NAME, ema.NAME and optimizer.SLOT.NAME with the names of the plain model.
    """
    tensors = {f"model.{name}": tensor for name, tensor in copy_of(train_step.model).items()}
    if train_step.ema is not None:
        ema = copy_of(train_step.ema.module)
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    for name, parameter in train_step.model.named_parameters():
        for slot, value in train_step.optimizer.state.get(parameter, {}).items():
            if value is not None:
                copied = torch.as_tensor(value).detach().to("cpu", copy=True)
                tensors[f"optimizer.{slot}.{name}"] = copied.contiguous()
    return tensors


def restore(train_step: TrainStep, checkpoint: Checkpoint) -> TrainState:
    """Load a checkpoint into the model, its EMA and the optimizer, and return this process's state.

    Raises `UserError` if the tensors are those of another architecture.
    """
    accelerator = train_step.accelerator
    if accelerator.scaler and checkpoint.metadata["scaler"]:  # fp16 may be resumed on a CPU
        accelerator.scaler.load_state_dict(checkpoint.metadata["scaler"])
    tensors = _broadcast_tensors(checkpoint.tensors, accelerator.device)

    def check_shapes(loaded: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
        if {name: tensor.shape for name, tensor in loaded.items()} != expected:
            raise UserError(
                f"{checkpoint.run.path} holds the checkpoint of another architecture",
                "Start a new run",
            )

    def load(module: nn.Module, prefix: str) -> None:
        loaded = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        state = module.state_dict()
        check_shapes(loaded, {name: tensor.shape for name, tensor in state.items()})
        state.update(loaded)  # keeps the versions of modules, which MNASNet needs
        module.load_state_dict(state)

    load(train_step.model, "model.")
    if train_step.ema is not None:
        load(train_step.ema.module, "ema.")
    all_shapes = optimizer_state_shapes(train_step.optimizer)
    defaults = train_step.optimizer.defaults
    reads_step = defaults.get("fused") or defaults.get("capturable")  # on the device
    for name, parameter in train_step.model.named_parameters():
        shapes = all_shapes.get(parameter, {})
        keys = {slot: f"optimizer.{slot}.{name}" for slot in shapes}
        loaded = {slot: tensors[key] for slot, key in keys.items() if key in tensors}
        if loaded:  # there are none before the first step that is not skipped
            check_shapes(loaded, shapes)
        for slot, tensor in loaded.items():
            if tensor.shape == parameter.shape:  # same memory format as the parameter
                tensor = torch.empty_like(parameter).copy_(tensor)
            else:  # the number of steps: as in a new run, where the optimizer reads it
                tensor = tensor.float() if reads_step else tensor.float().cpu()
            train_step.optimizer.state[parameter][slot] = tensor.detach()
    return checkpoint.train_state(accelerator.process_index, accelerator.num_processes)


def _broadcast_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the main process's tensors on the device of every process."""
    specs = [(name, list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    received = {}
    for name, shape, dtype in broadcast_object_list([specs])[0]:
        tensor = tensors.get(name)
        tensor = torch.empty(shape, dtype=dtype) if tensor is None else tensor
        received[name] = broadcast(tensor.to(device))
    return received


def _check_room(train_step: TrainStep) -> None:
    """Raise `UserError` if the disk has no room for a checkpoint and the best weights."""
    if not train_step.accelerator.is_main_process:  # the others write nothing
        return
    copies = 2 + (train_step.ema is not None)
    size = copies * sum(t.nbytes for t in train_step.model.state_dict().values())
    all_shapes = optimizer_state_shapes(train_step.optimizer).values()
    size += sum(4 * shape.numel() for shapes in all_shapes for shape in shapes.values())
    check_free_space(Path(train_step.config.output_dir), size)
