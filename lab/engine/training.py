"""train_one_epoch: steps, accumulation, clipping, average of the weights, non-finite guard."""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from lab.config.schema import TrainConfig
from lab.cuda_graph import CUDAGraphRunner
from lab.data.loaders import Loader
from lab.data.sampler import derive_seed, shard
from lab.data.types import Batch
from lab.distributed import can_replay
from lab.errors import UserError

pass

from lab.checkpoint.train_state import TrainState
from lab.engine.lr_schedule import learning_rate
from lab.engine.optimizer import build_optimizer, set_learning_rate
from lab.models import find_model


def main_labels(labels: Tensor, partners: Tensor | None, share: float | Tensor) -> Tensor:
    """Of each sample the label with the larger share, int64 [n]."""
    if partners is None:
        return labels
    if isinstance(share, Tensor):  # which the host cannot look at without waiting
        return torch.where(share >= 0.5, labels, partners)
    return labels if share >= 0.5 else partners


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    partners: Tensor | None,
    share: float | Tensor,
    config: TrainConfig,
) -> Tensor:
    """The sum of the samples' cross-entropies; of mixed ones, that of both labels by `share`."""

    def with_labels(labels: Tensor) -> Tensor:
        smoothing = config.label_smoothing
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    if partners is None:
        return with_labels(labels)
    return share * with_labels(labels) + (1 - share) * with_labels(partners)


@dataclass(frozen=True)
class TrainMetrics:
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
class TrainStep:
    """The objects that a training step works on."""

    accelerator: Accelerator
    config: TrainConfig
    model: nn.Module  # the plain network
    wrapped_model: nn.Module  # the same, wrapped for training on all processes
    optimizer: torch.optim.Optimizer
    ema_model: nn.Module | None  # of the weights, where `ema` is on
    graph_runner: CUDAGraphRunner | None = (
        None  # `train_step`, where it can be sent to a GPU as one graph
    )

    def step(self, batch: Batch) -> Tensor | None:
        """`train_step`, replayed where it can be."""
        if self.graph_runner is None:
            return eager_step(self, batch)
        if batch.partners is None:
            return self.graph_runner(batch.images, batch.labels)
        share = batch.images.new_full((), cast(float, batch.share))
        return self.graph_runner(batch.images, batch.labels, batch.partners, share)

    @property
    def eval_model(self) -> nn.Module:
        """The plain network whose weights are evaluated and kept."""
        return self.model if self.ema_model is None else self.ema_model

    def set_training(self) -> None:
        """Training mode; BatchNorm of a frozen backbone keeps its statistics, and uses them."""
        self.wrapped_model.train()
        if self.config.freeze == "backbone":
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def to_device(model: nn.Module, name: str, device: torch.device) -> nn.Module:
    """The network on the device, in the memory format that its convolutions are fastest in."""
    if find_model(name).benefits_from_bf16 and device.type in ("cpu", "cuda"):
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def prepare(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> TrainStep:
    """The network and its optimizer, placed by Accelerate; raises `UserError`."""
    if config.sync_bn:
        if accelerator.device.type != "cuda":
            raise UserError("--sync-bn needs GPUs", "Leave it out on other devices")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.dropout >= 0:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    model = to_device(model, config.model, accelerator.device)
    ema_model = copy.deepcopy(model) if config.ema_decay else None
    if config.compile:
        if accelerator.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
            raise UserError("--compile needs a C++ compiler", "Install one, or leave it out")
        model.compile()  # in place: the keys of the weights stay those of the plain network
    replays = can_replay(accelerator, config)
    optimizer = build_optimizer(model, config, accelerator.device if replays else None)
    wrapped_model = accelerator.prepare(model)
    if accelerator.scaler:  # of fp16's gradients; else its wrapper's steps are only slower
        optimizer = accelerator.prepare(optimizer)
    train_step = TrainStep(accelerator, config, model, wrapped_model, optimizer, ema_model)
    if replays:
        train_step.graph_runner = CUDAGraphRunner(partial(_step_on_tensors, train_step))
    return train_step


def _step_on_tensors(
    train_step: TrainStep,
    images: Tensor,
    labels: Tensor,
    partners: Tensor | None = None,
    share: Tensor | float = 1.0,
) -> Tensor:
    """`train_step`, where the batch is all this process's; its positions are not read."""
    totals = eager_step(train_step, Batch(images, labels, labels, len(labels), partners, share))
    assert totals is not None
    return totals


def train_one_epoch(
    train_step: TrainStep,
    loader: Loader,
    position: TrainState,
    on_step: Callable[..., None],
    on_log: Callable[[dict[str, Any]], None],
    should_stop: Callable[[TrainState], bool] = lambda _: False,
) -> TrainMetrics | None:
    """Trains the rest of `position`'s epoch, and moves it; None where `must_stop`, asked after
    each step, said so.

    `on_step(step in epoch, images a second, loss)` is called after each step; `on_log` gets a row
    of steps.jsonl every `log_every` steps, `loss` being the mean over the global batch, or None
    where the step was skipped. Raises `UserError` where a loss was not finite.
    """
    accelerator, config, device = (
        train_step.accelerator,
        train_step.config,
        train_step.accelerator.device,
    )
    plan, done = loader.plan, position
    train_step.set_training()
    done.totals = done.totals.to(device)
    start, loss = time.perf_counter() - done.seconds, None
    num_samples = min(done.batch * plan.batch_size, plan.num_samples)
    for batch in loader.batches(done.epoch, done.batch):
        if config.max_steps and done.step >= config.max_steps:
            break
        lr = done.learning_rate = learning_rate(config, done.step, plan.num_batches)
        set_learning_rate(train_step.optimizer, lr)
        # Dropout's seed follows from the step: there is no random state to keep.
        seed_dropout(derive_seed(config.seed, done.step, accelerator.process_index), device)
        batch_sums = train_step.step(batch)
        done.step += 1
        done.batch += 1
        num_samples += batch.global_batch_size
        if batch_sums is None:
            done.skipped_steps += 1
            done.skipped_samples += batch.global_batch_size
        else:
            done.totals[:2] += batch_sums
            done.totals[2] += batch_sums[0].isfinite()
            if train_step.ema_model is not None:
                update_ema(train_step.ema_model, train_step.model, config.ema_decay, done.step)
        if done.step % config.log_every == 0:
            loss = None
            if batch_sums is not None:
                loss = accelerator.reduce(batch_sums[0]).item() / batch.global_batch_size
                _check_finite(accelerator, loss, done)
            on_log({"step": done.step, "epoch": done.epoch, "loss": loss, "learning_rate": lr})
        done.seconds = time.perf_counter() - start
        on_step(done.batch, num_samples / done.seconds, loss)
        if should_stop(done):
            return None
    loss_sum, num_correct, _ = accelerator.reduce(done.totals).tolist()
    _check_finite(accelerator, loss_sum, done)
    counted, seconds = num_samples - done.skipped_samples, max(1e-9, done.seconds)
    loss_mean, accuracy = (loss_sum / counted, num_correct / counted) if counted else (None, None)
    return TrainMetrics(loss_mean, accuracy, done.learning_rate, seconds, num_samples / seconds)


def eager_step(train_step: TrainStep, batch: Batch) -> Tensor | None:
    """One optimizer step; this process's [sum of losses, number of hits], float32 on the device.

    A mixed picture's loss is that of its two labels by their shares, and the label with the larger
    one is to hit. Both are of the logits alone; auxiliary classifiers add to what is minimised.

    With `on_nonfinite` "skip", None where a gradient was not finite: nothing was changed then.

    The gradient is that of the mean loss over the global batch, however unevenly it is cut: each
    process weighs its samples by 1 / num_global, and DistributedDataParallel's mean over processes
    is undone.
    """
    accelerator, config = train_step.accelerator, train_step.config
    scale = accelerator.num_processes / batch.global_batch_size
    totals: Any = 0.0
    skips = config.on_nonfinite == "skip"
    buffers = [buffer.clone() for buffer in train_step.model.buffers()] if skips else []
    # A process without samples still takes part: in the collectives, with empty parts.
    sizes = batch.part_sizes or _part_sizes(len(batch.labels), config.grad_accum_steps)
    parts = [part.split(sizes) for part in (batch.images, batch.labels)]
    partners_of = [None] * len(sizes) if batch.partners is None else batch.partners.split(sizes)
    for i, (images, labels, partners) in enumerate(zip(*parts, partners_of, strict=True)):
        last = i == len(sizes) - 1
        with nullcontext() if last else accelerator.no_sync(train_step.wrapped_model):
            outputs = train_step.wrapped_model(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = loss_sum(logits, labels, partners, batch.share, config)
            total = loss
            for other in auxiliary:
                weight = cast(float, train_step.model.auxiliary_weight)
                loss_of_other = loss_sum(other, labels, partners, batch.share, config)
                total = total + weight * loss_of_other
            accelerator.backward(total * scale)
        num_correct = logits.argmax(1) == main_labels(labels, partners, batch.share)
        totals = totals + torch.stack((loss.detach(), num_correct.sum()))
    if skips and not accelerator.scaler:
        # Of all processes together, so that they agree; reading it waits for the device.
        gradients = [p.grad for p in train_step.model.parameters() if p.grad is not None]
        if not nn.utils.get_total_norm(gradients).isfinite():
            _undo(train_step, buffers)
            return None
    if config.max_grad_norm:
        accelerator.clip_grad_norm_(train_step.wrapped_model.parameters(), config.max_grad_norm)
    train_step.optimizer.step()
    if skips and accelerator.scaler and accelerator.optimizer_step_was_skipped:
        _undo(train_step, buffers)
        return None
    train_step.optimizer.zero_grad()
    return totals


def _part_sizes(num_samples: int, grad_accum_steps: int) -> tuple[int, ...]:
    """Return the sizes of the parts of a batch that is this process's alone."""
    num_parts = max(1, min(grad_accum_steps, num_samples))
    cuts = [shard(num_samples, i, num_parts) for i in range(num_parts)]
    return tuple(cut.stop - cut.start for cut in cuts)


def _undo(train_step: TrainStep, buffers: list[Tensor]) -> None:
    """Undoes what a step that is not finite has done, to gradients and to BatchNorm's buffers."""
    train_step.optimizer.zero_grad()
    for buffer, before in zip(train_step.model.buffers(), buffers, strict=True):
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
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves `average` towards the network's weights after optimizer step `step` (from 1).

    Wholly at the first step, and by more than 1 - `decay` for a while, so that weights of chance
    are forgotten. Buffers are copied.
    """
    decay = min(decay, (step - 1) / (step + 9))
    torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)
    for kept, current in zip(ema_model.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def _check_finite(accelerator: Accelerator, loss: float, position: TrainState) -> None:
    """Nothing; raises where a loss of the epoch was not finite, as all are that follow it."""
    if math.isfinite(loss):
        return
    counts = accelerator.gather(position.totals[2:]).tolist()  # of each process's finite steps
    step = position.step - position.batch + position.skipped_steps + int(min(counts)) + 1
    where = f" on process {counts.index(min(counts))}" if len(counts) > 1 else ""
    raise UserError(
        f"the loss is {loss} at step {min(step, position.step)}{where} "
        f"(learning rate {position.learning_rate:g})",
        "Lower --lr or give --max-grad-norm 1 in a new run; --on-nonfinite skip, in a new run or one "
        "that goes on from a state, leaves such steps out",
    )
