"""Keeper: saves a run's states while it trains, and stops it; restore: goes on from one."""

import os
import shlex
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from lab import console
from lab.checkpoint import Writer, copy_of
from lab.data import Splits
from lab.disk import require_room
from lab.engine import Position, Trainer
from lab.errors import UserError
from lab.optim import slots
from lab.rundir import RunDir
from lab.states import FORMAT, POSITION, State, write
from lab.stopping import Stopper


class Keeper:
    """Writes a run's states while it trains, and says when it has to stop."""

    def __init__(
        self,
        run: RunDir,
        writer: Writer,
        stopper: Stopper,
        trainer: Trainer,
        splits: Splits,
        saved_step: int,
    ):
        self.run, self.writer, self.stopper, self.trainer = run, writer, stopper, trainer
        self.fingerprints, self.num_samples = splits.fingerprints, len(splits.train.labels)
        self.saved_step = saved_step  # of the newest state; 0: there is none
        self.reason = 0  # why it stopped: see Stopper

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """A `UserError` gets the last whole state as a hint."""
        with suppress(UserError) if error else nullcontext():
            self.writer.wait()  # before the directory is open to another training
        if isinstance(error, UserError):
            for state in self._states()[:1]:
                error.hint += f". The last complete state of the run is {state}"

    def _states(self) -> list[Path]:
        return self.run.checkpoints if self.run.writes else []

    def goodbye(self) -> int:
        """Says how to go on with a run that was stopped; the script's exit code."""
        # A launcher kills the others when the first one ends: not before the state is on disk.
        self.trainer.accelerator.wait_for_everyone()
        why, words = Stopper.describe(self.reason), ["python", "train.py", "--resume"]
        command = shlex.join([*words, str(self.run.path)])
        for state in self._states()[:1]:
            step = int(state.name.removeprefix("step-"))
            console.warn(f"stopped ({why}) after step {step}; go on with: {command}")
        if not self._states():
            console.warn(f"stopped ({why}), and no state could be written")
        return Stopper.exit_code(self.reason)

    def after_step(self, best: Mapping[str, Any], position: Position) -> bool:
        """Saves where a state is due; whether all processes stop now."""
        every = self.trainer.config.save_every
        self.reason = self.stopper.reason(position.step)
        if self.reason or (every and position.step % every == 0):
            self.save(best, position)
        return bool(self.reason)

    def after_epoch(self, position: Position) -> bool:
        """Whether all processes stop now; the epoch's state is written."""
        self.reason = self.stopper.reason(position.step, must_ask=True)
        return bool(self.reason)

    def save(self, best: Mapping[str, Any], position: Position) -> None:
        """Copies the state and begins to write it; called by all processes together.

        Where it cannot be written, the run says so and goes on, and older states stay.
        """
        if position.step == self.saved_step:
            return
        self.saved_step = position.step
        accelerator, config = self.trainer.accelerator, self.trainer.config
        sums = accelerator.gather(position.sums.to(accelerator.device)).view(-1, 3).tolist()
        if not self.run.writes:
            return
        self.writer.wait()
        about = {
            "format": FORMAT,
            "samples_seen": (position.epoch - 1) * self.num_samples
            + min(self.num_samples, position.batch * config.batch_size),
            "num_batches": -(-self.num_samples // config.batch_size),  # of an epoch
            "position": {name: getattr(position, name) for name in POSITION},
            "sums": sums,
            "best": dict(best),
            "config": asdict(config),
            "fingerprints": self.fingerprints,
            "precision": accelerator.mixed_precision,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "world_size": accelerator.num_processes,
        }
        self.writer.submit(self._write, collect(self.trainer), about)

    def _write(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        folder = self.run.states / f"step-{about['position']['step']:08}"
        names = [f"network.{name}" for name, _ in self.trainer.network.named_parameters()]
        values = [torch.tensor(about["sums"]), *(tensors[name] for name in names)]
        if not all(bool(value.isfinite().all()) for value in values):
            console.warn(f"{folder} is not written: the weights or the losses are not finite")
            return
        try:
            require_room(self.run.states, sum(t.nbytes for t in tensors.values()))
            self.run.sync_lines()
            write(folder, tensors, about)
        except (UserError, OSError) as error:
            console.warn(f"{folder} is not written: {error}")
            return
        remove_checkpoints(self.run, self.trainer.config.keep_states)


def remove_checkpoints(run: RunDir, keep: int) -> None:
    """Remove all checkpoints of a run but the newest `keep`; warn of one that cannot be removed."""
    for old in run.checkpoints[keep:] if run.writes else ():
        gone = old.with_name(f".{old.name}")
        try:
            os.replace(old, gone)  # never half there under its own name
            shutil.rmtree(gone)
        except OSError as error:
            console.warn(f"{old} is not removed: {error}")


def collect(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors of a state, copied to the CPU."""
    modules = {"network": trainer.network, "average": trainer.average}
    tensors = {
        f"{kind}.{name}": tensor
        for kind, module in modules.items()
        if module is not None
        for name, tensor in copy_of(module).items()
    }
    for name, parameter in trainer.network.named_parameters():
        for slot, value in trainer.optimizer.state.get(parameter, {}).items():
            if value is not None:
                kept = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
                tensors[f"optimizer.{slot}.{name}"] = kept
    return tensors


def restore(trainer: Trainer, state: State) -> Position:
    """Fills the network, its average and the optimizer on every process; the state's position.

    Raises `UserError` where the tensors are another network's.
    """
    scaler = trainer.accelerator.scaler
    if scaler and state.about["scaler"]:  # a run in fp16 goes on without it on a CPU
        scaler.load_state_dict(state.about["scaler"])
    tensors = _to_all(state.tensors, trainer.accelerator.device)

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

    fill(trainer.network, "network.")
    if trainer.average is not None:
        fill(trainer.average, "average.")
    kept_of = slots(trainer.optimizer)
    for name, parameter in trainer.network.named_parameters():
        expected = kept_of.get(parameter, {})
        keys = {slot: f"optimizer.{slot}.{name}" for slot in expected}
        found = {slot: tensors[key] for slot, key in keys.items() if key in tensors}
        if found:  # none before the first step that is not skipped
            require_shapes(found, expected)
        for slot, tensor in found.items():
            # One of the parameter's shape has its memory format, too.
            like = tensor.shape == parameter.shape
            kept = torch.empty_like(parameter).copy_(tensor) if like else tensor.float()
            trainer.optimizer.state[parameter][slot] = kept.detach()
    return state.position(trainer.accelerator.process_index, trainer.accelerator.num_processes)


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


def require_room_for(trainer: Trainer) -> None:
    """Nothing; raises `UserError` where the disk has no room for a state and the best weights."""
    if not trainer.accelerator.is_main_process:  # another machine's disk takes nothing
        return
    copies = 2 + (trainer.average is not None)
    size = copies * sum(t.nbytes for t in trainer.network.state_dict().values())
    kept_of = slots(trainer.optimizer)
    size += sum(4 * shape.numel() for kept in kept_of.values() for shape in kept.values())
    require_room(Path(trainer.config.output_dir), size)
