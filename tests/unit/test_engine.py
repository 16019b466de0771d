"""The training step's gradient, accumulation, clipping and EMA, and the metrics of an epoch."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainers import FakeWorld, prepare

from lab.checkpoint.train_state import TrainState
from lab.config.schema import TrainConfig
from lab.data.loaders import ResidentLoader
from lab.data.sampler import ShardedBatchSampler
from lab.data.transforms import BatchTransform
from lab.data.types import Batch, Split
from lab.distributed import build_accelerator
from lab.engine import training
from lab.engine.training import TrainStep, seed_dropout, to_device, train_one_epoch
from lab.errors import UserError
from lab.models import build_model

PLAIN = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "lr": 1.0,
}


@pytest.fixture(scope="module")
def accelerator():
    return build_accelerator(mixed_precision="no", threads=1, quiet=True)


def make_train_step(accelerator, **settings):
    torch.manual_seed(0)
    model = build_model("lenet5", num_classes=10, in_chans=1, image_size=28)
    return prepare(accelerator, model, TrainConfig(**PLAIN | {"dataset": "digits"} | settings))


def make_batch(num_samples, global_batch_size=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    return Batch(images, labels, torch.arange(num_samples), global_batch_size or num_samples)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_gradient(model, batch, **settings):
    model = copy.deepcopy(model)
    F.cross_entropy(model(batch.images), batch.labels, **settings).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("grad_accum_steps", [1, 3, 33, 100])
@pytest.mark.parametrize("num_samples", [1, 33])
def test_p2_a_step_follows_the_mean_gradient_with_any_accumulation(
    accelerator, num_samples, grad_accum_steps
):
    train_step, batch = (
        make_train_step(accelerator, grad_accum_steps=grad_accum_steps),
        make_batch(num_samples),
    )
    before, gradient = weights(train_step.model), mean_gradient(train_step.model, batch)
    logits = train_step.model(batch.images)
    loss_sum, num_correct = train_step.run(batch).tolist()
    assert loss_sum == pytest.approx(F.cross_entropy(logits, batch.labels, reduction="sum").item())
    assert num_correct == (logits.argmax(1) == batch.labels).sum()
    assert torch.allclose(before - weights(train_step.model), gradient, atol=1e-6)
    assert gradient.norm() > 0.1


def test_p2_a_part_of_a_batch_is_weighted_by_its_number_of_samples(accelerator):
    train_step, batch = make_train_step(accelerator), make_batch(3, global_batch_size=12)
    before, gradient = weights(train_step.model), mean_gradient(train_step.model, batch)
    train_step.run(batch)
    assert torch.allclose(before - weights(train_step.model), gradient * 3 / 12, atol=1e-6)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 2), (1, 0, 0)])
def test_p2_the_mean_of_the_processes_steps_is_the_step_of_one_process(
    accelerator, sizes, grad_accum_steps
):
    """DistributedDataParallel averages the gradients of the processes."""
    whole, start, steps = make_batch(sum(sizes)), 0, []
    for size in sizes:
        train_step = make_train_step(accelerator, grad_accum_steps=grad_accum_steps)
        train_step.accelerator = FakeWorld(accelerator, len(sizes))
        before, part = weights(train_step.model), slice(start, start + size)
        index = whole.indices[part]
        batch = Batch(whole.images[part], whole.labels[part], index, whole.global_batch_size)
        train_step.run(batch)
        steps.append(before - weights(train_step.model))
        start += size
    gradient = mean_gradient(make_train_step(accelerator).model, whole)
    assert torch.allclose(torch.stack(steps).mean(0), gradient, atol=1e-6)


@pytest.mark.parametrize("grad_accum_steps", [1, 4])
def test_p2_a_process_without_samples_takes_the_step_too(accelerator, grad_accum_steps):
    train_step = make_train_step(accelerator, grad_accum_steps=grad_accum_steps)
    before = weights(train_step.model)
    assert train_step.run(make_batch(0, global_batch_size=1)).tolist() == [0, 0]
    assert torch.equal(weights(train_step.model), before)
    assert all(module.training for module in train_step.model.modules())


class Flattening(nn.Module):
    """A model that reshapes as many do, which fails for an empty batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(784, 10)

    def forward(self, images):
        return self.linear(self.norm(images).view(images.size(0), -1))


def test_p2_a_model_that_accepts_no_empty_batch_is_trained_by_a_process_without_samples(
    accelerator,
):
    model = Flattening()
    train_step = prepare(accelerator, model, TrainConfig(**PLAIN | {"dataset": "digits"}))
    before = weights(model)
    assert train_step.run(make_batch(0, global_batch_size=1)).tolist() == [0, 0]
    assert torch.equal(weights(model), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    train_step.run(make_batch(2))
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_clipping_bounds_the_norm_of_the_whole_gradient(
    accelerator, max_grad_norm, grad_accum_steps
):
    train_step = make_train_step(
        accelerator, max_grad_norm=max_grad_norm, grad_accum_steps=grad_accum_steps
    )
    batch = make_batch(7)
    before, gradient = weights(train_step.model), mean_gradient(train_step.model, batch)
    train_step.run(batch)
    expected = gradient * min(1, max_grad_norm / gradient.norm().item())
    assert torch.allclose(before - weights(train_step.model), expected, rtol=1e-3, atol=1e-6)


def test_the_totals_of_a_step_hold_no_graph(accelerator):
    assert not make_train_step(accelerator).run(make_batch(5)).requires_grad


@pytest.mark.parametrize("warmup", [True, False])
def test_the_ema_follows_its_formula(accelerator, warmup):
    train_step = make_train_step(accelerator, ema_decay=0.2, lr=0.1)
    train_step.ema.warmup = warmup
    average = weights(train_step.model)
    for step, decay in enumerate((0, 1 / 11, 2 / 12, 0.2, 0.2), start=1):
        decay = decay if warmup else 0.2
        train_step.run(make_batch(5, seed=step))
        train_step.ema.update(train_step.model, step)
        average = decay * average + (1 - decay) * weights(train_step.model)
        assert torch.allclose(weights(train_step.eval_model), average, atol=1e-6)
    assert not torch.allclose(weights(train_step.model), average, atol=1e-3)


def test_the_ema_counts_the_steps_of_all_epochs(accelerator, monkeypatch):
    train_step, steps = make_train_step(accelerator, ema_decay=0.9), []
    monkeypatch.setattr(train_step.ema, "update", lambda model, step: steps.append(step))
    train(train_step, epoch=3, first_step=10)
    assert steps == [11, 12, 13, 14, 15]


def test_the_ema_has_the_statistics_of_the_models_batchnorm_layers(accelerator):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))
    config = TrainConfig(**PLAIN | {"dataset": "digits", "ema_decay": 0.9})
    train_step = prepare(accelerator, model, config)
    for step in (1, 2):
        train_step.run(make_batch(5, seed=step))
        train_step.ema.update(model, step)
    for found, expected in zip(train_step.eval_model.buffers(), model.buffers(), strict=True):
        assert torch.equal(found, expected)
        assert found.data_ptr() != expected.data_ptr()
    assert model[1].num_batches_tracked == 2


def make_loader(num_samples, batch_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_samples, 1, 28, 28), generator=generator).to(torch.uint8)
    split = Split(images, torch.arange(num_samples) % 10, tuple("0123456789"))
    sampler = ShardedBatchSampler(num_samples, batch_size, 0, 0, 1)
    cpu = torch.device("cpu")
    return ResidentLoader(split, sampler, BatchTransform((0.5,), (0.5,), (), cpu), cpu)


def train(train_step, num_samples=33, batch_size=8, epoch=1, first_step=0):
    """Return (metrics of the epoch, rows of steps.jsonl, calls of on_step)."""
    rows, calls = [], []
    state = TrainState(epoch=epoch, step=first_step)
    metrics = train_one_epoch(
        train_step,
        make_loader(num_samples, batch_size),
        state,
        on_step=lambda *arguments: calls.append(arguments),
        on_log=rows.append,
    )
    return metrics, rows, calls


def test_an_epoch_reports_its_steps_and_means_over_samples(accelerator):
    metrics, rows, calls = train(make_train_step(accelerator, lr=0.01, log_every=1))
    assert [(r["step"], r["epoch"], r["learning_rate"]) for r in rows] == [
        (s, 1, 0.01) for s in range(1, 6)
    ]
    losses = [row["loss"] for row in rows]
    assert metrics.loss == pytest.approx(
        (8 * sum(losses[:4]) + losses[4]) / 33
    )  # batches 8 .. 8, 1
    assert metrics.accuracy * 33 == pytest.approx(round(metrics.accuracy * 33))
    assert [step for step, _, _ in calls] == [1, 2, 3, 4, 5]
    assert metrics.images_per_second == pytest.approx(33 / metrics.seconds)


def test_the_seconds_of_an_epoch_include_the_steps_that_the_device_has_to_finish(
    accelerator, monkeypatch
):
    """On a GPU, reading the sum of the losses waits for them."""
    now = itertools.count()  # each call of the clock takes a second

    def reduce(tensor):
        for _ in range(1000):
            next(now)
        return tensor

    monkeypatch.setattr(accelerator, "reduce", reduce)
    monkeypatch.setattr("lab.engine.training.time.perf_counter", lambda: next(now))
    metrics, _, _ = train(make_train_step(accelerator))
    assert metrics.seconds > 1000
    assert metrics.images_per_second == 33 / metrics.seconds


def test_the_rate_follows_the_schedule_within_the_epoch(accelerator):
    train_step = make_train_step(accelerator, schedule="linear", lr=0.5, epochs=2, log_every=1)
    metrics, rows, _ = train(train_step, epoch=2, first_step=5)
    expected = [0.5 * (1 - step / 10) for step in range(5, 10)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected)
    assert metrics.learning_rate == pytest.approx(expected[-1])


@pytest.mark.parametrize("log_every", [1, 1000])
def test_p7_the_first_loss_that_is_not_finite_is_named(accelerator, log_every):
    train_step = make_train_step(accelerator, log_every=log_every)
    loader, state = make_loader(33, 8), TrainState(epoch=2, step=5)
    loader.transform = spoiling(loader.transform, bad=[2])
    with pytest.raises(UserError, match=r"the loss is nan at step 8 \(learning rate") as caught:
        train_one_epoch(train_step, loader, state, lambda *_: None, lambda _: None)
    assert state.batch == (3 if log_every == 1 else 5)
    assert "--on-nonfinite skip" in caught.value.hint


def test_p7_skipping_is_no_advice_where_it_is_on(accelerator, monkeypatch):
    """A loss can be infinite although all gradients are finite, as a masked class shows."""
    train_step = make_train_step(accelerator, on_nonfinite="skip")
    monkeypatch.setattr(TrainStep, "_loss_sum", lambda *_: logits_sum(*_) + math.inf)
    with pytest.raises(UserError, match="the loss is inf at step 1") as caught:
        train(train_step)
    assert "skip" not in caught.value.hint


def test_p7_skipped_steps_are_counted_before_the_first_loss_that_is_not_finite(accelerator):
    state = TrainState(step=10, batch=4, skipped_steps=1, totals=torch.tensor([0, 0, 2.0]))
    config = make_train_step(accelerator, on_nonfinite="skip").config
    with pytest.raises(UserError, match="the loss is inf at step 10 "):
        training._check_finite(accelerator, math.inf, config, state)


def logits_sum(_, logits, *__):
    return logits.sum()


def spoiling(transform, bad):
    """Return a transform whose calls numbered in `bad` return an image that contains NaN."""

    def spoiled(images, bits):
        images = transform(images, bits)
        if spoiled.calls in bad:
            images[0] = math.nan
        spoiled.calls += 1
        return images

    spoiled.calls, spoiled.augment = 0, transform.augment
    return spoiled


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_decay": 0.9, "grad_accum_steps": 2}, {"optimizer": "adamw"}, {"optimizer": "muon"}],
)
def test_a_step_that_is_not_finite_is_skipped_completely(accelerator, settings):
    """The result is that of training without this batch, except for the count."""

    def after(bad, settings):
        train_step = make_train_step(accelerator, lr=0.01, log_every=1, **settings)
        loader, rows, state = make_loader(40, 8), [], TrainState()
        loader.transform = spoiling(loader.transform, bad)
        snapshots = []

        def log(row):
            rows.append(row["loss"])
            snapshots.append((weights(train_step.model), weights(train_step.eval_model)))

        metrics = train_one_epoch(train_step, loader, state, lambda *_: None, log)
        return metrics, rows, state, snapshots

    # After the first step the EMA would still be equal to the weights.
    metrics, losses, state, snapshots = after([2, 3], settings | {"on_nonfinite": "skip"})
    assert losses[2:4] == [None, None]
    assert (state.skipped_steps, state.skipped_samples) == (2, 16)
    assert metrics.loss == pytest.approx((losses[0] + losses[1] + losses[4]) / 3)
    for before, between in zip(snapshots[1], snapshots[3], strict=True):
        assert torch.equal(before, between)
    assert not torch.equal(snapshots[4][0], snapshots[3][0])
    assert all(torch.isfinite(w).all() for w in snapshots[4])
    clean, _, state, _ = after([], settings | {"on_nonfinite": "skip"})
    plain, _, _, _ = after([], settings)
    assert clean == dataclasses.replace(  # except for the times
        plain, seconds=clean.seconds, images_per_second=clean.images_per_second
    )
    assert state.skipped_steps == 0


def test_a_skipped_step_leaves_the_statistics_of_batchnorm(accelerator):
    """A NaN in the running statistics would stay, and every later evaluation would be NaN."""
    model = Flattening()
    config = TrainConfig(**PLAIN | {"dataset": "digits", "on_nonfinite": "skip"})
    train_step = prepare(accelerator, model, config)
    train_step.run(make_batch(4))
    before = copy.deepcopy(model.state_dict())
    batch = make_batch(4, seed=1)
    batch.images[0] = math.nan
    assert train_step.run(batch) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw", "muon"])
def test_a_step_that_gradscaler_skips_is_skipped(accelerator, monkeypatch, optimizer):
    """GradScaler works on a CPU, too, though lab uses it for fp16 on GPUs only."""
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    monkeypatch.setattr(accelerator, "_optimizers", [])
    settings = {"on_nonfinite": "skip", "optimizer": optimizer, "lr": 1e-3, "momentum": 0.9}
    train_step = make_train_step(accelerator, **settings)
    images, labels = torch.randn(4, 1, 28, 28), torch.arange(4)
    infinite = images.where(labels[:, None, None, None] > 0, math.inf)
    before = weights(train_step.model)
    assert train_step(Batch(infinite, labels, labels, 4)) is None
    assert torch.equal(weights(train_step.model), before)
    assert train_step(Batch(images, labels, labels, 4)) is not None
    assert not torch.equal(weights(train_step.model), before)


def test_gradient_accumulation_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    one = build_accelerator(mixed_precision="no", threads=1, quiet=True)
    weight = torch.ones(1, requires_grad=True)
    one.backward(weight.sum())
    assert weight.grad == 1


def test_an_epoch_can_be_stopped_and_continued(accelerator):
    whole, parts = (make_train_step(accelerator, lr=0.01, log_every=1) for _ in range(2))
    rows, state = [], TrainState()
    expected, expected_rows, _ = train(whole)

    def should_stop(state):
        return state.batch == 2

    loader = make_loader(33, 8)
    assert train_one_epoch(parts, loader, state, lambda *_: None, rows.append, should_stop) is None
    assert (state.batch, state.step) == (2, 2)
    state.seconds += 1000
    metrics = train_one_epoch(parts, loader, state, lambda *_: None, rows.append)
    assert rows == expected_rows
    assert (metrics.loss, metrics.accuracy) == (expected.loss, expected.accuracy)
    assert metrics.seconds > 1000
    assert torch.equal(weights(parts.model), weights(whole.model))


def test_p2_dropout_depends_on_the_step_and_the_seed_only(accelerator):
    def trained_weights(seed=42, first_step=0):
        torch.manual_seed(0)
        model = build_model("lenet5", num_classes=10, in_chans=1, image_size=28)
        model.classifier.insert(0, torch.nn.Dropout(0.5))
        config = TrainConfig(**PLAIN | {"dataset": "digits", "lr": 0.1, "seed": seed})
        train_step = prepare(accelerator, model, config)
        torch.manual_seed(torch.seed())  # the random state before must not matter
        train(train_step, first_step=first_step)
        return weights(train_step.model)

    first = trained_weights()
    assert torch.equal(trained_weights(), first)
    assert not torch.equal(trained_weights(seed=43), first)
    assert not torch.equal(trained_weights(first_step=5), first)


def test_p2_dropout_differs_between_processes(accelerator):
    """Each process draws masks for its own samples."""

    def trained_weights(rank):
        torch.manual_seed(0)
        model = build_model("lenet5", num_classes=10, in_chans=1, image_size=28)
        model.classifier.insert(0, nn.Dropout(0.5))
        train_step = prepare(accelerator, model, TrainConfig(**PLAIN | {"dataset": "digits"}))
        train_step.accelerator = FakeWorld(accelerator, 2, rank)
        train(train_step)
        return weights(train_step.model)

    assert not torch.equal(trained_weights(0), trained_weights(1))


@pytest.mark.parametrize(("dropout", "expected"), [(-1.0, 0.5), (0.0, 0.0), (0.25, 0.25)])
def test_dropout_is_the_models_or_unless_set(accelerator, dropout, expected):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    train_step = prepare(accelerator, model, TrainConfig(dropout=dropout))
    train_step.set_training_mode()
    seed_dropout(0, accelerator.device)
    fraction = train_step.wrapped_model[1](torch.ones(100_000)).count_nonzero().item() / 100_000
    assert fraction == pytest.approx(1 - expected, abs=0.01)


def test_p7_dropout_without_dropout_layers_is_an_error(accelerator):
    with pytest.raises(UserError, match="has no layers of type"):
        prepare(accelerator, nn.Linear(4, 2), TrainConfig(dropout=0.5))


def test_convolutions_on_a_cpu_are_in_the_faster_memory_format():
    model = build_model("alexnet", num_classes=10, in_chans=3, image_size=8)
    weight = to_device(model, "alexnet", torch.device("cpu")).features[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


class Nonempty(nn.BatchNorm1d):
    """A layer that does not accept an empty batch, nor a batch of one image in training."""

    def forward(self, features):
        assert len(features)
        return super().forward(features)


def test_a_process_without_samples_passes_batchnorm(accelerator):
    model = nn.Sequential(nn.Flatten(), Nonempty(784), nn.Linear(784, 10))
    train_step = prepare(accelerator, model, TrainConfig(**PLAIN | {"dataset": "digits"}))
    assert train_step.run(make_batch(0, 8)).tolist() == [0, 0]
