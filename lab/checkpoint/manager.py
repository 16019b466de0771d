"""Keeper: saves a run's states while it trains, and stops it; restore: goes on from one."""

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from lab import console
from lab.checkpoint.atomic_io import check_free_space
from lab.checkpoint.interrupt import InterruptHandler
from lab.checkpoint.run_dir import RunDir
from lab.checkpoint.train_state import (
    CHECKPOINT_FORMAT,
    TRAIN_STATE_TYPES,
    Checkpoint,
    TrainState,
    optimizer_state_shapes,
    write_checkpoint,
)
from lab.checkpoint.weights import copy_of
from lab.data import Splits
from lab.engine.training import TrainStep
from lab.errors import UserError


class AsyncWriter:
    """Writes files while training goes on, one thing at a time and in the order given."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "AsyncWriter":
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


class CheckpointManager:
    """Writes a run's states while it trains, and says when it has to stop."""

    def __init__(
        self,
        run: RunDir,
        writer: AsyncWriter,
        interrupts: InterruptHandler,
        train_step: TrainStep,
        splits: Splits,
        saved_step: int,
    ):
        self.run, self.writer, self.interrupts, self.train_step = (
            run,
            writer,
            interrupts,
            train_step,
        )
        self.fingerprints, self.num_samples = splits.fingerprints, len(splits.train.labels)
        self.saved_step = saved_step  # of the newest state; 0: there is none
        self.reason = 0  # why it stopped: see Stopper

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """A `UserError` gets the last whole state as a hint."""
        with suppress(UserError) if error else nullcontext():
            self.writer.wait()  # before the directory is open to another training
        if isinstance(error, UserError):
            for state in self._states()[:1]:
                error.hint += f". The last complete state of the run is {state}"

    def _states(self) -> list[Path]:
        return self.run.checkpoints if self.run.is_main_process else []

    def report_interruption(self) -> int:
        """Says how to go on with a run that was stopped; the script's exit code."""
        # A launcher kills the others when the first one ends: not before the state is on disk.
        self.train_step.accelerator.wait_for_everyone()
        why, words = InterruptHandler.describe(self.reason), ["python", "train.py", "--resume"]
        command = shlex.join([*words, str(self.run.path)])
        for state in self._states()[:1]:
            step = int(state.name.removeprefix("step-"))
            console.warn(f"stopped ({why}) after step {step}; go on with: {command}")
        if not self._states():
            console.warn(f"stopped ({why}), and no state could be written")
        return InterruptHandler.exit_code(self.reason)

    def after_step(self, best: Mapping[str, Any], position: TrainState) -> bool:
        """Saves where a state is due; whether all processes stop now."""
        every = self.train_step.config.checkpoint_every
        self.reason = self.interrupts.reason(position.step)
        if self.reason or (every and position.step % every == 0):
            self.save(best, position)
        return bool(self.reason)

    def after_epoch(self, position: TrainState) -> bool:
        """Whether all processes stop now; the epoch's state is written."""
        self.reason = self.interrupts.reason(position.step, must_ask=True)
        return bool(self.reason)

    def save(self, best: Mapping[str, Any], position: TrainState) -> None:
        """Copies the state and begins to write it; called by all processes together.

        Where it cannot be written, the run says so and goes on, and older states stay.
        """
        if position.step == self.saved_step:
            return
        self.saved_step = position.step
        accelerator, config = self.train_step.accelerator, self.train_step.config
        totals = accelerator.gather(position.totals.to(accelerator.device)).view(-1, 3).tolist()
        if not self.run.is_main_process:
            return
        self.writer.wait()
        metadata = {
            "format": CHECKPOINT_FORMAT,
            "samples_seen": (position.epoch - 1) * self.num_samples
            + min(self.num_samples, position.batch * config.batch_size),
            "num_batches": -(-self.num_samples // config.batch_size),  # of an epoch
            "position": {name: getattr(position, name) for name in TRAIN_STATE_TYPES},
            "totals": totals,
            "best": dict(best),
            "config": asdict(config),
            "fingerprints": self.fingerprints,
            "precision": accelerator.mixed_precision,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "world_size": accelerator.num_processes,
        }
        self.writer.submit(self._write, state_dict(self.train_step), metadata)

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        folder = self.run.checkpoints_dir / f"step-{metadata['position']['step']:08}"
        names = [f"network.{name}" for name, _ in self.train_step.model.named_parameters()]
        values = [torch.tensor(metadata["totals"]), *(tensors[name] for name in names)]
        if not all(bool(value.isfinite().all()) for value in values):
            console.warn(f"{folder} is not written: the weights or the losses are not finite")
            return
        try:
            check_free_space(self.run.checkpoints_dir, sum(t.nbytes for t in tensors.values()))
            self.run.sync_lines()
            write_checkpoint(folder, tensors, metadata)
        except (UserError, OSError) as error:
            console.warn(f"{folder} is not written: {error}")
            return
        remove_checkpoints(self.run, self.train_step.config.keep_checkpoints)


def remove_checkpoints(run: RunDir, keep: int) -> None:
    """Remove all checkpoints of a run but the newest `keep`; warn of one that cannot be removed."""
    for old in run.checkpoints[keep:] if run.is_main_process else ():
        gone = old.with_name(f".{old.name}")
        try:
            os.replace(old, gone)  # never half there under its own name
            shutil.rmtree(gone)
        except OSError as error:
            console.warn(f"{old} is not removed: {error}")


def state_dict(train_step: TrainStep) -> dict[str, Tensor]:
    """All tensors of a state, copied to the CPU."""
    modules = {"network": train_step.model, "average": train_step.ema_model}
    tensors = {
        f"{kind}.{name}": tensor
        for kind, module in modules.items()
        if module is not None
        for name, tensor in copy_of(module).items()
    }
    for name, parameter in train_step.model.named_parameters():
        for slot, value in train_step.optimizer.state.get(parameter, {}).items():
            if value is not None:
                kept = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
                tensors[f"optimizer.{slot}.{name}"] = kept
    return tensors


def restore(train_step: TrainStep, state: Checkpoint) -> TrainState:
    """Fills the network, its average and the optimizer on every process; the state's position.

    Raises `UserError` where the tensors are another network's.
    """
    scaler = train_step.accelerator.scaler
    if scaler and state.metadata["scaler"]:  # a run in fp16 goes on without it on a CPU
        scaler.load_state_dict(state.metadata["scaler"])
    tensors = _to_all(state.tensors, train_step.accelerator.device)

    def require_shapes(found: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
        if {k: v.shape for k, v in found.items()} != expected:
            raise UserError(
                f"{state.run.path} holds the state of another network", "Start a new run"
            )

    def fill(module: nn.Module, kind: str) -> None:
        found = {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
        own = module.state_dict()
        require_shapes(found, {k: v.shape for k, v in own.items()})
        own.update(found)  # which keeps the modules' versions: MNASNet's asks for its own
        module.load_state_dict(own)

    fill(train_step.model, "network.")
    if train_step.ema_model is not None:
        fill(train_step.ema_model, "average.")
    kept_of = optimizer_state_shapes(train_step.optimizer)
    for name, parameter in train_step.model.named_parameters():
        expected = kept_of.get(parameter, {})
        keys = {slot: f"optimizer.{slot}.{name}" for slot in expected}
        found = {slot: tensors[key] for slot, key in keys.items() if key in tensors}
        if found:  # none before the first step that is not skipped
            require_shapes(found, expected)
        for slot, tensor in found.items():
            # One of the parameter's shape has its memory format, too.
            like = tensor.shape == parameter.shape
            kept = torch.empty_like(parameter).copy_(tensor) if like else tensor.float()
            train_step.optimizer.state[parameter][slot] = kept.detach()
    return state.position(
        train_step.accelerator.process_index, train_step.accelerator.num_processes
    )


def _to_all(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The main process's tensors, on the device of every process."""
    listed = [(name, list(t.shape), t.dtype) for name, t in tensors.items()]
    listed = broadcast_object_list([listed])[0]
    found = {}
    for name, shape, dtype in listed:
        tensor = tensors.get(name)
        tensor = torch.empty(shape, dtype=dtype) if tensor is None else tensor
        found[name] = broadcast(tensor.to(device))
    return found


def check_room(train_step: TrainStep) -> None:
    """Nothing; raises `UserError` where the disk has no room for a state and the best weights."""
    if not train_step.accelerator.is_main_process:  # another machine's disk takes nothing
        return
    copies = 2 + (train_step.ema_model is not None)
    size = copies * sum(t.nbytes for t in train_step.model.state_dict().values())
    kept_of = optimizer_state_shapes(train_step.optimizer)
    size += sum(4 * shape.numel() for kept in kept_of.values() for shape in kept.values())
    check_free_space(Path(train_step.config.output_dir), size)
