"""Training step and one epoch of training.

A step computes the gradient of the mean loss over the global batch, whatever part of that batch
this process has and however it is cut for gradient accumulation (promise P2).
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from lab.checkpoint.train_state import TrainState
from lab.config.schema import TrainConfig
from lab.cuda_graph import CUDAGraphRunner, can_capture_steps
from lab.data.loaders import Loader
from lab.data.sampler import derive_seed, shard
from lab.data.types import Batch
from lab.engine.ema import ModelEma
from lab.engine.grad_checkpointing import checkpoint_gradients
from lab.engine.lr_schedule import learning_rate
from lab.engine.optimizer import set_learning_rate
from lab.errors import UserError
from lab.models import find_model


@dataclass(frozen=True)
class TrainMetrics:
    """Metrics of one epoch of training, means over the samples of all processes.

    The loss includes label smoothing, augmentation and dropout, and leaves out auxiliary
    classifiers. With class weights, it is the mean of the weighted means of the batches. For images
    mixed by mixup or cutmix, the correct class is the one with the larger target. Loss and accuracy
    are None if every step was skipped.
    """

    loss: float | None
    accuracy: float | None
    learning_rate: float  # of the last step
    seconds: float
    images_per_second: float


def to_device(model: nn.Module, name: str, device: torch.device) -> nn.Module:
    """Return the model on the device, in the memory format in which its convolutions are fastest.

    `name` is that of --model.
    """
    benefits_on_gpu = device.type == "cuda" and find_model(name).benefits_from_bf16
    if device.type == "cpu" or benefits_on_gpu:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def configure_model(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Return the model on the device, with --sync-bn, --dropout, --grad-checkpointing and
    --compile applied.

    Raises `UserError` if the model, the device or the machine cannot do what these options ask for.
    """
    if config.sync_bn:
        if device.type != "cuda":
            raise UserError("--sync-bn needs GPUs", "Leave it out on other devices")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.dropout >= 0:
        layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        if not layers:
            raise UserError(
                f"{config.model} has no layers of type nn.Dropout", "Leave out --dropout"
            )
        for layer in layers:
            layer.p = config.dropout
    if config.grad_checkpointing:
        checkpoint_gradients(model, config.model)
    model = to_device(model, config.model, device)
    if config.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
            raise UserError("--compile needs a C++ compiler", "Install one, or leave it out")
        model.compile()  # in place, so that the names of the weights stay those of the plain model
    return model


@dataclass
class TrainStep:
    """One optimizer step, and the objects that it works on.

    Calling it runs a step, as a CUDA graph if `can_capture_steps` returns True.
    """

    accelerator: Accelerator
    config: TrainConfig
    model: nn.Module  # without wrappers
    wrapped_model: nn.Module  # what `accelerator.prepare` returned
    optimizer: torch.optim.Optimizer
    ema: ModelEma | None = None
    graph_runner: CUDAGraphRunner | None = field(init=False, default=None)
    accepts_empty_batch: bool | None = field(init=False, default=None)  # None: not tried yet

    def __post_init__(self) -> None:
        if can_capture_steps(self.accelerator, self.config):
            self.graph_runner = CUDAGraphRunner(self._run_on_tensors)

    @property
    def eval_model(self) -> nn.Module:
        """Return the model that is evaluated and saved, without wrappers: the EMA, if any."""
        return self.model if self.ema is None else self.ema.module

    def set_training_mode(self) -> None:
        """Set training mode; with --freeze, BatchNorm layers stay in evaluation mode."""
        self.wrapped_model.train()
        if self.config.freeze != "none":
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def __call__(self, batch: Batch) -> Tensor | None:
        """Run one optimizer step; see `run`."""
        if self.graph_runner is None:
            return self.run(batch)
        return self.graph_runner(batch.images, batch.labels, batch.targets, batch.class_weights)

    def _run_on_tensors(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        batch = Batch(images, labels, labels, len(labels), targets, class_weights=weights)
        totals = self.run(batch)
        assert totals is not None  # steps that may be skipped are not captured
        return totals

    def run(self, batch: Batch) -> Tensor | None:
        """Run one optimizer step, kernel by kernel.

        Returns this process's [loss sum, number of correct predictions], float32 on the device; or
        None if the step was skipped because a gradient was not finite (`--on-nonfinite skip`).
        Auxiliary classifiers add to the loss that is minimized, not to the loss that is returned.

        Each process weights its samples by 1 / global batch size, and the average over processes in
        DistributedDataParallel is undone by multiplying with their number. Class weights have a
        mean of 1 over the global batch, so that the loss is the weighted mean.
        """
        accelerator, config, model = self.accelerator, self.config, self.model
        scale = accelerator.num_processes / batch.global_batch_size
        totals: Any = 0.0
        may_skip = config.on_nonfinite == "skip"
        buffers = [buffer.clone() for buffer in model.buffers()] if may_skip else []
        # A process without samples still takes part in the collectives, with empty parts.
        sizes = batch.part_sizes or _part_sizes(len(batch.labels), config.grad_accum_steps)
        all_targets = batch.labels if batch.targets is None else batch.targets
        parts = zip(batch.images.split(sizes), all_targets.split(sizes), strict=True)
        for i, (images, targets) in enumerate(parts):
            is_last = i == len(sizes) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.wrapped_model):
                logits, *auxiliary_logits = self._forward(images)
                loss = self._loss_sum(logits, targets, batch.class_weights)
                total_loss = loss
                for other_logits in auxiliary_logits:
                    weight = cast(float, model.auxiliary_weight)
                    other_loss = self._loss_sum(other_logits, targets, batch.class_weights)
                    total_loss = total_loss + weight * other_loss
                accelerator.backward(total_loss * scale)
            classes = targets.argmax(1) if targets.is_floating_point() else targets
            num_correct = (logits.argmax(1) == classes).sum()
            totals = totals + torch.stack((loss.detach(), num_correct))
        if may_skip and not accelerator.scaler:
            # Gradients are averaged, so all processes decide the same. Reading the norm waits for
            # the device.
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not nn.utils.get_total_norm(gradients).isfinite():
                self._undo(buffers)
                return None
        if config.max_grad_norm:
            accelerator.clip_grad_norm_(self.wrapped_model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        if may_skip and accelerator.scaler and accelerator.optimizer_step_was_skipped:
            self._undo(buffers)
            return None
        self.optimizer.zero_grad()
        return totals

    def _forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits [n, K], and those of auxiliary classifiers.

        A process without samples has no images. Many models do not accept that: then the process
        computes the logits of random images, and discards them, so that all gradients are zero.
        """
        inputs = images
        if not len(images) and not self._accepts(images):
            inputs = torch.randn(2, *images.shape[1:], device=images.device)
        outputs = self.wrapped_model(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs if inputs is images else tuple(logits[:0] for logits in outputs)

    def _accepts(self, images: Tensor) -> bool:
        """Return whether the model can compute the logits of `images`, an empty batch.

        Models that do are not given random images, which would change the statistics of BatchNorm
        layers that processes synchronize.
        """
        if self.accepts_empty_batch is None:
            self.model.eval()  # in which the layers of different processes do not communicate
            try:
                with torch.no_grad():
                    self.model(images)
                self.accepts_empty_batch = True
            except Exception:  # of the user's code, or of a library
                self.accepts_empty_batch = False
            self.set_training_mode()
        return self.accepts_empty_batch

    def _loss_sum(self, logits: Tensor, targets: Tensor, class_weights: Tensor | None) -> Tensor:
        """Return the sum of the cross-entropies; targets are int64 [n], or soft, float32 [n, K].

        Each term of a cross-entropy has the weight of its class, also those of label smoothing and
        of the two labels of a mixed image.
        """
        smoothing = self.config.label_smoothing
        return F.cross_entropy(
            logits, targets, class_weights, reduction="sum", label_smoothing=smoothing
        )

    def _undo(self, buffers: list[Tensor]) -> None:
        """Discard the gradients, and restore the BatchNorm buffers from before the step."""
        self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def train_one_epoch(
    train_step: TrainStep,
    loader: Loader,
    state: TrainState,
    on_step: Callable[..., None],
    on_log: Callable[[dict[str, Any]], None],
    should_stop: Callable[[TrainState], bool] = lambda _: False,
) -> TrainMetrics | None:
    """Train the rest of the epoch that `state` is in, updating `state` after each step.

    `on_step(step in the epoch, images per second, loss)` is called after each step, `on_log(row)`
    every `log_every` steps with a row of steps.jsonl. Its loss is the mean over the global batch,
    or None if the step was skipped. `should_stop(state)` is called last.

    Returns None if `should_stop` returned True. Raises `UserError` if a loss was not finite.
    """
    accelerator, config = train_step.accelerator, train_step.config
    sampler, device = loader.sampler, accelerator.device
    train_step.set_training_mode()
    state.totals = state.totals.to(device)
    start, loss = time.perf_counter() - state.seconds, None
    num_samples = min(state.batch * sampler.batch_size, sampler.num_samples)
    for batch in loader.batches(state.epoch, state.batch):
        if config.max_steps and state.step >= config.max_steps:
            break
        lr = state.learning_rate = learning_rate(config, state.step, sampler.num_batches)
        set_learning_rate(train_step.optimizer, lr)
        # Seeded by the step, so that a checkpoint needs no random state.
        seed_dropout(derive_seed(config.seed, state.step, accelerator.process_index), device)
        totals = train_step(batch)
        state.step += 1
        state.batch += 1
        num_samples += batch.global_batch_size
        if totals is None:
            state.skipped_steps += 1
            state.skipped_samples += batch.global_batch_size
        else:
            state.totals[:2] += totals
            state.totals[2] += totals[0].isfinite()
            if train_step.ema is not None:
                train_step.ema.update(train_step.model, state.step)
        if state.step % config.log_every == 0:
            loss = None
            if totals is not None:
                loss = accelerator.reduce(totals[0]).item() / batch.global_batch_size
                _check_finite(accelerator, loss, config, state)
            on_log({"step": state.step, "epoch": state.epoch, "loss": loss, "learning_rate": lr})
        state.seconds = time.perf_counter() - start
        on_step(state.batch, num_samples / state.seconds, loss)
        if should_stop(state):
            return None
    loss_sum, num_correct, _ = accelerator.reduce(state.totals).tolist()
    state.seconds = time.perf_counter() - start  # until the device has finished the last step
    _check_finite(accelerator, loss_sum, config, state)
    num_trained, seconds = num_samples - state.skipped_samples, max(1e-9, state.seconds)
    loss_mean, accuracy = None, None
    if num_trained:
        loss_mean, accuracy = loss_sum / num_trained, num_correct / num_trained
    return TrainMetrics(loss_mean, accuracy, state.learning_rate, seconds, num_samples / seconds)


def history_row(
    state: TrainState, metrics: TrainMetrics, scores: dict[str, float], eval_seconds: float
) -> dict[str, Any]:
    """Return a row of history.jsonl: an epoch's metrics on the training and validation split."""
    return {
        "epoch": state.epoch,
        "train_loss": metrics.loss,
        "train_accuracy": metrics.accuracy,
        "val_loss": scores["loss"],
        "val_accuracy": scores["accuracy"],
        "val_macro_f1": scores["macro_f1"],
        "learning_rate": metrics.learning_rate,
        "skipped_steps": state.skipped_steps,
        "train_seconds": metrics.seconds,
        "eval_seconds": eval_seconds,
        "images_per_second": metrics.images_per_second,
    }


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that the model's dropout layers draw from.

    `torch.manual_seed` would do the same, but on a machine with an unused GPU each call stores a
    stack trace until CUDA is initialized.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def _part_sizes(num_samples: int, grad_accum_steps: int) -> tuple[int, ...]:
    """Return the sizes of the gradient accumulation parts of a batch that has not been cut."""
    num_parts = max(1, min(grad_accum_steps, num_samples))
    parts = [shard(num_samples, i, num_parts) for i in range(num_parts)]
    return tuple(part.stop - part.start for part in parts)


def _check_finite(
    accelerator: Accelerator, loss: float, config: TrainConfig, state: TrainState
) -> None:
    """Raise `UserError`, naming the first such step, if a loss of the epoch was not finite."""
    if math.isfinite(loss):
        return
    counts = accelerator.gather(state.totals[2:]).tolist()  # of finite steps, for each process
    step = state.step - state.batch + state.skipped_steps + int(min(counts)) + 1
    rank = f" on process {counts.index(min(counts))}" if len(counts) > 1 else ""
    hint = "Start a new run with a lower --lr or with --max-grad-norm 1"
    if config.on_nonfinite != "skip":
        hint += (
            "; or give --on-nonfinite skip, which skips steps with gradients that are not finite, "
            "in a new run or with --resume"
        )
    raise UserError(
        f"the loss is {loss} at step {min(step, state.step)}{rank} "
        f"(learning rate {state.learning_rate:g})",
        hint,
    )
