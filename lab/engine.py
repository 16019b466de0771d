"""train_one_epoch: steps, accumulation, clipping, average of the weights, non-finite guard."""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.config import TrainConfig
from lab.data.loaders import Batch, Loader, fold, shard
from lab.distributed import can_replay
from lab.errors import UserError
from lab.graphs import Replayed
from lab.losses import heavier, loss_sum
from lab.models import find_model
from lab.optim import build_optimizer, learning_rate, set_learning_rate


@dataclass
class Position:
    """How far a run is; with the weights and the optimizer, all that it goes on from."""

    epoch: int = 1
    batch: int = 0  # batches done of that epoch
    step: int = 0  # batches done since the run began
    skipped_steps: int = 0  # of this epoch's, by `on_nonfinite`
    skipped_samples: int = 0
    seconds: float = 0.0  # spent on the epoch's batches
    learning_rate: float = 0.0  # of the last step
    # The epoch's sum of losses, of hits, and of steps with a finite loss; float32, this process's.
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))

    def next_epoch(self) -> "Position":
        """The beginning of the epoch that follows."""
        return Position(epoch=self.epoch + 1, step=self.step)


@dataclass(frozen=True)
class Trained:
    """What an epoch of training gave; means are over its samples, of all processes."""

    # As trained on: label smoothing, augmentation and dropout included; not auxiliary classifiers.
    # Of mixed pictures, the accuracy is that of the label with the larger share.
    # None where every step was skipped.
    loss: float | None
    accuracy: float | None
    learning_rate: float  # of the last step
    seconds: float
    images_per_second: float


@dataclass
class Trainer:
    """The objects that a training step works on."""

    accelerator: Accelerator
    config: TrainConfig
    network: nn.Module  # the plain network
    model: nn.Module  # the same, wrapped for training on all processes
    optimizer: torch.optim.Optimizer
    average: nn.Module | None  # of the weights, where `ema` is on
    replayed: Replayed | None = None  # `train_step`, where it can be sent to a GPU as one graph

    def step(self, batch: Batch) -> Tensor | None:
        """`train_step`, replayed where it can be."""
        if self.replayed is None:
            return train_step(self, batch)
        if batch.partners is None:
            return self.replayed(batch.images, batch.labels)
        share = batch.images.new_full((), cast(float, batch.share))
        return self.replayed(batch.images, batch.labels, batch.partners, share)

    @property
    def evaluated(self) -> nn.Module:
        """The plain network whose weights are evaluated and kept."""
        return self.network if self.average is None else self.average

    def set_training(self) -> None:
        """Training mode; BatchNorm of a frozen backbone keeps its statistics, and uses them."""
        self.model.train()
        if self.config.freeze == "backbone":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def lay_out(network: nn.Module, name: str, device: torch.device) -> nn.Module:
    """The network on the device, in the memory format that its convolutions are fastest in."""
    if find_model(name).large and device.type in ("cpu", "cuda"):
        network = network.to(memory_format=torch.channels_last)
    return network.to(device)


def prepare(accelerator: Accelerator, network: nn.Module, config: TrainConfig) -> Trainer:
    """The network and its optimizer, placed by Accelerate; raises `UserError`."""
    if config.sync_bn:
        if accelerator.device.type != "cuda":
            raise UserError("--sync-bn needs GPUs", "Leave it out on other devices")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if config.dropout >= 0:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    network = lay_out(network, config.model, accelerator.device)
    average = copy.deepcopy(network) if config.ema else None
    if config.compile:
        if accelerator.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
            raise UserError("--compile needs a C++ compiler", "Install one, or leave it out")
        network.compile()  # in place: the keys of the weights stay those of the plain network
    replays = can_replay(accelerator, config)
    optimizer = build_optimizer(network, config, accelerator.device if replays else None)
    model = accelerator.prepare(network)
    if accelerator.scaler:  # of fp16's gradients; else its wrapper's steps are only slower
        optimizer = accelerator.prepare(optimizer)
    trainer = Trainer(accelerator, config, network, model, optimizer, average)
    if replays:
        trainer.replayed = Replayed(partial(_step_on_tensors, trainer))
    return trainer


def _step_on_tensors(
    trainer: Trainer,
    images: Tensor,
    labels: Tensor,
    partners: Tensor | None = None,
    share: Tensor | float = 1.0,
) -> Tensor:
    """`train_step`, where the batch is all this process's; its positions are not read."""
    sums = train_step(trainer, Batch(images, labels, labels, len(labels), partners, share))
    assert sums is not None
    return sums


def train_one_epoch(
    trainer: Trainer,
    loader: Loader,
    position: Position,
    on_step: Callable[..., None],
    on_log: Callable[[dict[str, Any]], None],
    must_stop: Callable[[Position], bool] = lambda _: False,
) -> Trained | None:
    """Trains the rest of `position`'s epoch, and moves it; None where `must_stop`, asked after
    each step, said so.

    `on_step(step in epoch, images a second, loss)` is called after each step; `on_log` gets a row
    of steps.jsonl every `log_every` steps, `loss` being the mean over the global batch, or None
    where the step was skipped. Raises `UserError` where a loss was not finite.
    """
    accelerator, config, device = trainer.accelerator, trainer.config, trainer.accelerator.device
    plan, done = loader.plan, position
    trainer.set_training()
    done.sums = done.sums.to(device)
    start, loss = time.perf_counter() - done.seconds, None
    num_samples = min(done.batch * plan.batch_size, plan.num_samples)
    for batch in loader.batches(done.epoch, done.batch):
        if config.max_steps and done.step >= config.max_steps:
            break
        lr = done.learning_rate = learning_rate(config, done.step, plan.num_batches)
        set_learning_rate(trainer.optimizer, lr)
        # Dropout's seed follows from the step: there is no random state to keep.
        seed_dropout(fold(config.seed, done.step, accelerator.process_index), device)
        batch_sums = trainer.step(batch)
        done.step += 1
        done.batch += 1
        num_samples += batch.num_global
        if batch_sums is None:
            done.skipped_steps += 1
            done.skipped_samples += batch.num_global
        else:
            done.sums[:2] += batch_sums
            done.sums[2] += batch_sums[0].isfinite()
            if trainer.average is not None:
                update_average(trainer.average, trainer.network, config.ema, done.step)
        if done.step % config.log_every == 0:
            loss = None
            if batch_sums is not None:
                loss = accelerator.reduce(batch_sums[0]).item() / batch.num_global
                _require_finite(accelerator, loss, done)
            on_log({"step": done.step, "epoch": done.epoch, "loss": loss, "learning_rate": lr})
        done.seconds = time.perf_counter() - start
        on_step(done.batch, num_samples / done.seconds, loss)
        if must_stop(done):
            return None
    loss_sum, hits, _ = accelerator.reduce(done.sums).tolist()
    _require_finite(accelerator, loss_sum, done)
    counted, seconds = num_samples - done.skipped_samples, max(1e-9, done.seconds)
    loss_mean, accuracy = (loss_sum / counted, hits / counted) if counted else (None, None)
    return Trained(loss_mean, accuracy, done.learning_rate, seconds, num_samples / seconds)


def train_step(trainer: Trainer, batch: Batch) -> Tensor | None:
    """One optimizer step; this process's [sum of losses, number of hits], float32 on the device.

    A mixed picture's loss is that of its two labels by their shares, and the label with the larger
    one is to hit. Both are of the logits alone; auxiliary classifiers add to what is minimised.

    With `on_nonfinite` "skip", None where a gradient was not finite: nothing was changed then.

    The gradient is that of the mean loss over the global batch, however unevenly it is cut: each
    process weighs its samples by 1 / num_global, and DistributedDataParallel's mean over processes
    is undone.
    """
    accelerator, config = trainer.accelerator, trainer.config
    scale = accelerator.num_processes / batch.num_global
    sums: Any = 0.0
    skips = config.on_nonfinite == "skip"
    buffers = [buffer.clone() for buffer in trainer.network.buffers()] if skips else []
    # A process without samples still takes part: in the collectives, with empty parts.
    sizes = batch.part_sizes or _part_sizes(len(batch.labels), config.accumulate)
    parts = [part.split(sizes) for part in (batch.images, batch.labels)]
    partners_of = [None] * len(sizes) if batch.partners is None else batch.partners.split(sizes)
    for i, (images, labels, partners) in enumerate(zip(*parts, partners_of, strict=True)):
        last = i == len(sizes) - 1
        with nullcontext() if last else accelerator.no_sync(trainer.model):
            outputs = trainer.model(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = loss_sum(logits, labels, partners, batch.share, config)
            total = loss
            for other in auxiliary:
                weight = cast(float, trainer.network.auxiliary_weight)
                loss_of_other = loss_sum(other, labels, partners, batch.share, config)
                total = total + weight * loss_of_other
            accelerator.backward(total * scale)
        hits = logits.argmax(1) == heavier(labels, partners, batch.share)
        sums = sums + torch.stack((loss.detach(), hits.sum()))
    if skips and not accelerator.scaler:
        # Of all processes together, so that they agree; reading it waits for the device.
        gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
        if not nn.utils.get_total_norm(gradients).isfinite():
            _undo(trainer, buffers)
            return None
    if config.clip_norm:
        accelerator.clip_grad_norm_(trainer.model.parameters(), config.clip_norm)
    trainer.optimizer.step()
    if skips and accelerator.scaler and accelerator.optimizer_step_was_skipped:
        _undo(trainer, buffers)
        return None
    trainer.optimizer.zero_grad()
    return sums


def _part_sizes(num_samples: int, accumulate: int) -> tuple[int, ...]:
    """Return the sizes of the parts of a batch that is this process's alone."""
    num_parts = max(1, min(accumulate, num_samples))
    cuts = [shard(num_samples, i, num_parts) for i in range(num_parts)]
    return tuple(cut.stop - cut.start for cut in cuts)


def _undo(trainer: Trainer, buffers: list[Tensor]) -> None:
    """Undoes what a step that is not finite has done, to gradients and to BatchNorm's buffers."""
    trainer.optimizer.zero_grad()
    for buffer, before in zip(trainer.network.buffers(), buffers, strict=True):
        buffer.copy_(before)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seeds what the network draws on its device.

    Not torch.manual_seed: with CUDA built in but not in use, each call of it leaves a stack trace
    behind, for the day that CUDA is used.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Moves `average` towards the network's weights after optimizer step `step` (from 1).

    Wholly at the first step, and by more than 1 - `decay` for a while, so that weights of chance
    are forgotten. Buffers are copied.
    """
    decay = min(decay, (step - 1) / (step + 9))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)


def _require_finite(accelerator: Accelerator, loss: float, position: Position) -> None:
    """Nothing; raises where a loss of the epoch was not finite, as all are that follow it."""
    if math.isfinite(loss):
        return
    counts = accelerator.gather(position.sums[2:]).tolist()  # of each process's finite steps
    step = position.step - position.batch + position.skipped_steps + int(min(counts)) + 1
    where = f" on process {counts.index(min(counts))}" if len(counts) > 1 else ""
    raise UserError(
        f"the loss is {loss} at step {min(step, position.step)}{where} "
        f"(learning rate {position.learning_rate:g})",
        "Lower --lr or give --clip-norm 1 in a new run; --on-nonfinite skip, in a new run or one "
        "that goes on from a state, leaves such steps out",
    )
