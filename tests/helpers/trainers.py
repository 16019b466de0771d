"""Small training steps and loaders on a CPU or a GPU, for the tests of the training step."""

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.common import prepare
from lab.checkpoint.train_state import TrainState
from lab.config.schema import TrainConfig
from lab.data.loaders import ResidentLoader
from lab.data.sampler import ShardedBatchSampler, balanced_class_weights
from lab.data.transforms import BatchTransform
from lab.data.types import Split
from lab.distributed import build_accelerator
from lab.engine.training import train_one_epoch
from lab.models import build_model

SIZES = {"lenet5": (1, 28), "alexnet": (3, 8)}  # channels, image size in pixels
CROPS = ("crop", "flip", "cutout")
UNUSUAL = {"label_smoothing": 0.1, "ema_decay": 0.9, "grad_accum_steps": 2, "max_grad_norm": 1.0}
VARIANTS = [
    {},
    UNUSUAL,
    {"optimizer": "adamw", "lr": 1e-3},
    {"class_weights": "balanced"},
]


def place(device, mixed_precision="no"):
    """Return an Accelerator of a device, "cpu" or "cuda", without TF32, as the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = build_accelerator(mixed_precision=mixed_precision, threads=1, quiet=True)
    assert accelerator.device.type == device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return accelerator


class FakeWorld:
    """An Accelerator that reports another rank and world size, without other processes."""

    def __init__(self, accelerator, num_processes, process_index=0):
        self.accelerator = accelerator
        self.num_processes, self.process_index = num_processes, process_index

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


def make_train_step(accelerator, model="lenet5", **settings):
    in_chans, size = SIZES[model]
    torch.manual_seed(0)
    built_model = build_model(model, num_classes=10, in_chans=in_chans, image_size=size)
    plain = {"model": model, "dataset": "digits", "schedule": "constant", "log_every": 10**9}
    return prepare(accelerator, built_model, TrainConfig(**plain | {"lr": 0.01} | settings))


def make_loader(
    accelerator, model="lenet5", num_samples=33, batch_size=8, seed=0, augment=CROPS, graphs=False,
    class_weights="none",
):  # fmt: skip
    in_chans, size = SIZES[model]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        256, (num_samples, in_chans, size, size), generator=generator, dtype=torch.uint8
    )
    split = Split(images, torch.arange(num_samples) % 10, tuple("0123456789"))
    augment = augment if seed is not None else ()
    transform = BatchTransform((0.5,) * in_chans, (0.5,) * in_chans, augment, accelerator.device)
    weights = balanced_class_weights(split.labels, 10) if class_weights == "balanced" else None
    sampler = ShardedBatchSampler(
        num_samples, batch_size, seed, 0, 1, labels=split.labels, class_weights=weights
    )
    return ResidentLoader(split, sampler, transform, accelerator.device, graphs)


def train(train_step, loader, epochs=1, on_step=lambda *_: None, on_log=lambda _: None):
    """Train, and return the loss of each epoch."""
    state, losses = TrainState(), []
    for _ in range(epochs):
        losses.append(train_one_epoch(train_step, loader, state, on_step, on_log).loss)
        state = state.next_epoch()
    return losses


def weights(model):
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
