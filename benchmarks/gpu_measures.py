"""The measurements of gpu.py: each function sets up one case and returns its figures.

Times are in ms between two events of the device, or between two readings of the clock on a CPU,
which only tests the script. Figures are medians over nine blocks of 30 calls, with their range.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from typing import Any

CHANNELS = {"mnist": 1, "cifar10": 3}


@dataclass(frozen=True)
class Case:
    """Describe how to train; the other settings are those of the `notebook` recipe."""

    name: str
    model: str
    dataset: str = "cifar10"
    batch_size: int = 128
    precision: str = "no"
    tf32: bool = True
    channels_last: bool = False
    compile: str = ""  # a mode of torch.compile
    augment: str = ""
    graphs: bool = True
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Bench:
    """Hold what all measurements share."""

    device: Any
    splits: dict[str, Any]  # lab.data.splits.Splits by dataset
    quick: bool
    parts: tuple[str, ...] = ()  # names of the parts to measure
    matrix_rate: float = 0.0  # operations per second; 0: unknown

    @property
    def repeats(self) -> tuple[int, int]:
        """Return the number of timed blocks, and of calls in each."""
        return (2, 1) if self.quick else (9, 30)


def synchronize(device: Any) -> None:
    """Wait until the device has finished all its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def time_calls(call: Callable[[], object], bench: Bench) -> list[float]:
    """Return the milliseconds per call for each block, between two events of the device."""
    import torch

    num_blocks, calls = bench.repeats
    for _ in range(calls):
        call()
    if bench.device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(num_blocks):
            for _ in range(calls):
                call()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) / calls for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_blocks + 1)]
    events[0].record()
    for event in events[1:]:
        for _ in range(calls):
            call()
        event.record()
    synchronize(bench.device)
    return [a.elapsed_time(b) / calls for a, b in pairwise(events)]


def timing(times: list[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of times in ms."""
    return {"ms": statistics.median(times), "ms_low": min(times), "ms_high": max(times)}


def count_launches(call: Callable[[], object], bench: Bench) -> dict[str, int]:
    """Return how many kernels, copies and fills the GPU runs in a call, and the host's launches."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if bench.device.type != "cuda":
        return {}
    synchronize(bench.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        synchronize(bench.device)
    events = record.events()
    asked = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return {
        "kernels": sum(e.device_type == DeviceType.CUDA for e in events if not is_label(e)),
        "launches": sum(e.name.startswith(asked) for e in events),
    }


def is_label(event: Any) -> bool:
    """Return whether a profiler event is an annotation, such as "Optimizer.step", and no work."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")


def measure_matrix_rate(bench: Bench, precision: str) -> dict[str, float]:
    """Measure the operations per second of a square matrix product of random numbers."""
    import torch

    size = 256 if bench.quick else 8192
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
    times = time_calls(lambda: a @ b, bench)
    return timing(times) | {"per_second": 2 * size**3 / statistics.median(times) * 1e3}


def measure_copy_rate(bench: Bench) -> dict[str, float]:
    """Measure the bytes per second, read and written, of a copy within the device's memory."""
    import torch

    size = 2**20 if bench.quick else 2**31
    source = torch.randint(256, (size,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), bench)
    return timing(times) | {"per_second": 2 * size / statistics.median(times) * 1e3}


def build(case: Case, bench: Bench) -> tuple[Any, Any, Any]:
    """Return the training step, training loader and test loader of a case, built as in train.py."""
    import torch
    from common import prepare

    from lab.config.recipes import resolve
    from lab.data.loaders import LoaderOptions, build_loader, eval_batch_size
    from lab.data.transforms import BatchTransform
    from lab.distributed import build_accelerator
    from lab.models import build_model

    dataset = case.dataset
    settings = {"model": case.model, "dataset": dataset, "recipe": "notebook"}
    settings |= {"batch_size": case.batch_size}
    settings |= {"augment": case.augment or "none", **dict(case.settings)}
    settings |= {"cuda_graphs": "auto" if case.graphs else "never"}
    config = resolve(settings)
    accelerator = build_accelerator(mixed_precision=case.precision, quiet=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
    options = LoaderOptions.create(accelerator, "resident", 0, config.cuda_graphs)
    splits, device = bench.splits[dataset], accelerator.device
    augment = BatchTransform(splits.mean, splits.std, config.augmentations, device)
    plain = BatchTransform(splits.mean, splits.std, (), device)
    loader = build_loader(splits.train, augment, options, batch_size=case.batch_size, seed=0)
    size = eval_batch_size(device, 32)
    test = build_loader(splits.test, plain, options, batch_size=size, seed=None)
    torch.manual_seed(0)
    model = build_model(case.model, num_classes=10, in_chans=CHANNELS[dataset], image_size=32)
    train_step = prepare(accelerator, model, config)
    form = torch.channels_last if case.channels_last else torch.contiguous_format
    train_step.model.to(memory_format=form)
    if case.compile:
        train_step.model.compile(mode=case.compile)
    return train_step, loader, test


def full_batches(loader: Any, number: int) -> list[Any]:
    """Return the full batches among the first `number` of an epoch."""
    size = loader.sampler.batch_size
    return [b for b in islice(loader.batches(1), number) if len(b.labels) == size]


def count_operations(case: Case, batch: Any) -> int:
    """Return the floating-point operations of a step's products and convolutions, both passes."""
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode

    from lab.models import build_model

    _, in_chans, size, _ = batch.images.shape
    model = build_model(case.model, num_classes=10, in_chans=in_chans, image_size=size)
    model.to(batch.images.device)
    with FlopCounterMode(display=False) as counter:
        outputs = model(batch.images)  # some have auxiliary classifiers
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([F.cross_entropy(o, batch.labels) for o in several]).sum().backward()
    return counter.get_total_flops()


def measure_step(case: Case, bench: Bench) -> dict[str, Any]:
    """Measure a training step on prepared batches: time, utilization, launches and memory."""
    import torch

    train_step, loader, _ = build(case, bench)
    batches = full_batches(loader, 8)
    operations = count_operations(case, batches[0])
    train_step.wrapped_model.train()
    endless = cycle(batches)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = timing(time_calls(lambda: train_step(next(endless)), bench))
    row["images_per_second"] = case.batch_size / row["ms"] * 1e3
    row["operations"] = operations
    if bench.matrix_rate:
        row["utilization"] = operations / row["ms"] * 1e3 / bench.matrix_rate
    if bench.device.type == "cuda":
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row | count_launches(lambda: train_step(next(endless)), bench)


def measure_pipeline(case: Case, bench: Bench) -> dict[str, Any]:
    """Measure loading, augmenting and normalising a batch, averaged over an epoch."""
    _, loader, _ = build(case, bench)
    times = []
    for epoch in range(3):
        synchronize(bench.device)
        start = time.perf_counter()
        num_batches = sum(1 for _ in loader.batches(epoch))
        synchronize(bench.device)
        times.append(1e3 * (time.perf_counter() - start) / num_batches)
    row = timing(times[1:]) | {"images_per_second": case.batch_size / min(times[1:]) * 1e3}
    batches = loader.batches(1)
    next(batches)
    return row | count_launches(lambda: next(batches), bench)


def measure_epochs(case: Case, bench: Bench, num_epochs: int) -> dict[str, Any]:
    """Measure the seconds of each epoch of training and of its evaluation."""
    from lab.checkpoint.train_state import TrainState
    from lab.engine.evaluation import predict_all
    from lab.engine.training import train_one_epoch

    train_step, loader, test = build(case, bench)
    state, train_seconds, eval_seconds = TrainState(), [], []
    begin = time.perf_counter()
    for _ in range(num_epochs):
        trained = train_one_epoch(train_step, loader, state, lambda *_: None, lambda _: None)
        assert trained is not None
        state = state.next_epoch()
        start = time.perf_counter()
        accuracy = predict_all(train_step.accelerator, train_step.eval_model, test).scores()[
            "accuracy"
        ]
        train_seconds.append(trained.seconds)
        eval_seconds.append(time.perf_counter() - start)
    seconds = time.perf_counter() - begin
    steady = statistics.median(train_seconds[1:] or train_seconds)
    row = {
        "ms": 1e3 * steady / loader.sampler.num_batches,
        "images_per_second": loader.sampler.num_samples / steady,
        "seconds": seconds,
        "train_seconds": train_seconds,
        "eval_seconds": eval_seconds,
        "accuracy": accuracy,
    }
    batch = full_batches(loader, 1)[0]
    operations = count_operations(case, batch) / case.batch_size * loader.sampler.num_samples
    if bench.matrix_rate:
        row["utilization"] = operations / steady / bench.matrix_rate
    return row


def check_synchronisation(case: Case, bench: Bench) -> dict[str, Any]:
    """Raise if the host waits for the device during a step; return the number of steps checked."""
    import torch

    from lab.checkpoint.train_state import TrainState
    from lab.engine.training import train_one_epoch

    train_step, loader, _ = build(case, bench)
    train_step.config = replace(train_step.config, max_steps=5, log_every=10**9)

    def watch(step: int, *_: object) -> None:
        # After the first step, and not after the last: the ends of an epoch may wait.
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if step < 5 else "default")

    try:
        train_one_epoch(train_step, loader, TrainState(), lambda *_: None, lambda _: None)
        train_one_epoch(train_step, loader, TrainState(), watch, lambda _: None)
    finally:
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"steps_without": 4} if bench.device.type == "cuda" else {"skipped": "needs CUDA"}
