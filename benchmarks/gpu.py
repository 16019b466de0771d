"""Measure training on one GPU: ceilings, steps, input pipeline, epochs, synchronisations.

  python benchmarks/gpu.py                          random pixels, as many as MNIST and CIFAR-10
  python benchmarks/gpu.py --data-dir DATA          the real images, in train.py's --data-dir
  python benchmarks/gpu.py --device cpu --quick     test this script on tiny data, in seconds

Takes less than nine minutes on one GPU: measurements that have not started after --minutes are
skipped and listed as such. If a measurement fails, its error is recorded and the others continue. A
table is printed at the end; the JSON file contains all figures. Targets for one H100: an epoch of
LeNet-5 in 0.5 s, 20 epochs of AlexNet with evaluations in 15 s, and AlexNet's steps at 40 % of the
measured bfloat16 matrix rate.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from common import write_json
from gpu_measures import (
    CHANNELS,
    Bench,
    Case,
    check_synchronisation,
    measure_copy_rate,
    measure_epochs,
    measure_matrix_rate,
    measure_pipeline,
    measure_step,
)

from lab.errors import UserError, run_script, suggestion

COUNTS = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}  # to train on, to test on
PARTS = ("ceilings", "synchronisation", "epochs", "pipeline", "steps")
COLUMNS = ("ms", "images_per_second", "utilization", "kernels", "launches", "peak_mb")

LENET = partial(Case, model="lenet5", dataset="mnist")
ALEXNET = partial(Case, model="alexnet", augment="crop,flip")
BF16 = partial(ALEXNET, precision="bf16", channels_last=True)

OTHER_MODELS = (
    "googlenet",
    "densenet",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "vit_tiny",
    "vit_small",
    "vit_hybrid",
)
ADAMW = (("optimizer", "adamw"), ("lr", 1e-3))
MUON = (("optimizer", "muon"), ("lr", 2e-3))

STEPS = [
    LENET("lenet5 TF32"),
    LENET("lenet5 TF32, kernel by kernel", graphs=False),
    LENET("lenet5 float32", tf32=False),
    LENET("lenet5 TF32, channels_last", channels_last=True),
    LENET("lenet5 bfloat16", precision="bf16"),
    LENET("lenet5 TF32, batch 4096", batch_size=4096),
    BF16("alexnet bfloat16, channels_last"),
    BF16("alexnet bfloat16, channels_last, by kernels", graphs=False),
    ALEXNET("alexnet bfloat16", precision="bf16"),
    ALEXNET("alexnet float32", tf32=False),
    ALEXNET("alexnet TF32"),
    ALEXNET("alexnet TF32, channels_last", channels_last=True),
    BF16("alexnet bfloat16, AdamW", settings=ADAMW),
    BF16("alexnet bfloat16, Muon", settings=MUON),
    BF16("alexnet bfloat16, Muon, by kernels", settings=MUON, graphs=False),
    BF16("alexnet bfloat16, batch 512", batch_size=512),
    BF16("alexnet bfloat16, batch 2048", batch_size=2048),
    BF16("alexnet bfloat16, batch 8192", batch_size=8192),
    BF16("alexnet bfloat16, compile", compile="default"),
    BF16("alexnet bfloat16, batch 2048, compile", batch_size=2048, compile="default"),
    *(BF16(f"{name} bfloat16", model=name) for name in OTHER_MODELS),
]
EPOCHS = [  # and how many of them
    (LENET("lenet5, epochs"), 6),
    (LENET("lenet5, epochs, kernel by kernel", graphs=False), 3),
    (BF16("alexnet, 20 epochs"), 20),
    (BF16("alexnet, epochs, kernel by kernel", graphs=False), 3),
    (BF16("alexnet, Muon, 20 epochs", settings=MUON), 20),
]
BATCHES = [
    LENET("lenet5, batches"),
    ALEXNET("alexnet, batches"),
    ALEXNET("alexnet, batches, kernel by kernel", graphs=False),
]
UNUSUAL = (
    ("label_smoothing", 0.1),
    ("ema_decay", 0.99),
    ("grad_accum_steps", 2),
    ("max_grad_norm", 1.0),
)
CHECKS = [
    LENET("lenet5", augment="crop,flip,cutout", settings=UNUSUAL),
    BF16("alexnet", augment="crop,flip,cutout", settings=UNUSUAL),
]


def load(data_dir: str | None, quick: bool) -> dict[str, Any]:
    """Return both datasets as lab's `Splits` at 32 pixels, with random images if no `data_dir`."""
    import torch

    from lab.config.recipes import resolve
    from lab.data import DATASETS as SPECS
    from lab.data import DataConfig
    from lab.data.splits import Splits, load_splits
    from lab.data.types import Split

    def draw(name: str, count: int) -> Split:
        generator = torch.Generator().manual_seed(count)
        shape = (count, CHANNELS[name], 32, 32)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator)
        return Split(images, labels, tuple("0123456789"))

    splits = {}
    for model, name in (("lenet5", "mnist"), ("alexnet", "cifar10")):
        if data_dir:
            settings = {"model": model, "recipe": "notebook", "data_dir": data_dir}
            config = DataConfig.of(resolve(settings))
            splits[name] = load_splits(config, float("inf"), torch.get_num_threads())
            continue
        num_train, num_test = (10, 5) if quick else COUNTS[name]
        train, test = draw(name, num_train), draw(name, num_test)
        spec = SPECS[name]
        splits[name] = Splits(train, test, test, spec.mean, spec.std, "test", {})
    return splits


def attempt(rows: dict, name: str, deadline: float, measure: Callable[[], dict]) -> dict:
    """Store the result of `measure`, its error or that it was skipped in `rows`, and return it."""
    import torch

    start = time.monotonic()
    if start > deadline:
        row: dict[str, Any] = {"skipped": "out of time"}
    else:
        try:
            row = measure()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        torch.cuda.empty_cache()
        row["measured_in"] = time.monotonic() - start
    rows[name] = row
    print(f"  {name:44} {row.get('error') or row.get('skipped') or 'done'}"[:160], flush=True)
    return row


def run_all(bench: Bench, deadline: float) -> dict[str, dict]:
    """Run all measurements, starting with those that have targets, and return their rows."""
    report: dict[str, dict] = {}

    def part(name: str, plan: dict[str, Callable[[], dict]]) -> dict[str, dict]:
        report[name] = {}
        if name not in bench.parts:
            return report[name]
        for line, measure in plan.items():
            attempt(report[name], line, deadline, measure)
        return report[name]

    def plan(measure: Callable[..., dict], cases: list[Case], *words: Any) -> dict:
        fit = cases
        if bench.quick:  # without cases that are the same on this device
            small = [tiny(case, bench.device.type) for case in cases]
            fit = [*{replace(case, name="", tf32=True): case for case in reversed(small)}.values()]
        return {case.name: partial(measure, case, bench, *words) for case in fit}

    products = {
        f"matrix product, {name}": partial(measure_matrix_rate, bench, name)
        for name in ("bfloat16", "float32")
    }
    ceilings = part("ceilings", products | {"copy": partial(measure_copy_rate, bench)})
    rate = ceilings.get("matrix product, bfloat16", {}).get("per_second", 0.0)
    bench = replace(bench, matrix_rate=rate)
    part("synchronisation", plan(check_synchronisation, CHECKS))
    epochs: dict[str, Callable[[], dict]] = {}
    for case, number in EPOCHS:
        if bench.quick and not is_plain(case):
            continue
        epochs |= plan(measure_epochs, [case], 2 if bench.quick else number)
    part("epochs", epochs)
    part("pipeline", plan(measure_pipeline, BATCHES))
    part("steps", plan(measure_step, [c for c in STEPS if not bench.quick or is_plain(c)]))
    return report


def is_plain(case: Case) -> bool:
    """Return whether --quick runs the case: not if it differs from another only on a GPU."""
    known = case.model in ("lenet5", "alexnet")
    return known and case.graphs and not case.compile and case.batch_size == 128


def tiny(case: Case, device_type: str) -> Case:
    """Return the case with a small batch, and without bfloat16 if the device emulates it."""
    from lab.distributed import has_native_bf16

    precision = case.precision if has_native_bf16(device_type) else "no"
    return replace(case, batch_size=4, precision=precision)


def table(report: dict[str, dict]) -> list[str]:
    """Return the figures as lines of text."""
    lines = []
    for name, row in report["ceilings"].items():
        if "per_second" in row:
            lines.append(f"{name:44} {row['per_second'] / 1e12:10.2f} T/s")
    lines += ["", " " * 44 + "".join(f"{c.replace('_per_second', '/s'):>12}" for c in COLUMNS)]
    for part in ("pipeline", "epochs", "steps"):
        for name, row in report[part].items():
            cells = "".join(cell(row.get(column), column) for column in COLUMNS)
            lines.append(f"{name:44}{cells}" if "ms" in row else f"{name:44}  {why(row)}")
    lines.append("")
    for name, row in report["synchronisation"].items():
        waits = row.get("skipped") or why(row) or "never"
        lines.append(f"{name}, host waits for the device: {waits}")
    for name, row in report["epochs"].items():
        if "seconds" in row:
            epoch = statistics.median(row["train_seconds"])
            lines.append(
                f"{name}: {row['seconds']:.2f} s with evaluation; {epoch:.3f} s to train one epoch"
            )
    return lines


def why(row: dict) -> str:
    """Return why a measurement has no figure."""
    return (row.get("error") or row.get("skipped") or "")[:100].replace("\n", " ")


def cell(value: float | None, column: str) -> str:
    """Return a figure as a cell of the table."""
    form = {"ms": ".3f", "utilization": ".1%"}.get(column, ",.0f")
    return f"{'-' if value is None else format(value, form):>12}"


def main() -> None:
    """Measure, print the table and write the JSON file. Raises `UserError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="directory of MNIST and CIFAR-10; default: random pixels"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="test the script on tiny data")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST", help="default: all")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="start no measurement after this"
    )
    parser.add_argument("--json", metavar="FILE", default="gpu.json", help="all figures")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    if unknown := set(args.parts.split(",")) - set(PARTS):
        raise UserError(f"unknown part {min(unknown)}", suggestion(min(unknown), PARTS))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU", "Give --device cpu --quick to test the script")
    pixels = f"from {args.data_dir}" if args.data_dir else "random, so accuracies are meaningless"
    print(f"pixels: {pixels}", flush=True)
    splits, parts = load(args.data_dir, args.quick), tuple(args.parts.split(","))
    bench = Bench(torch.device(args.device), splits, args.quick, parts=parts)
    report = run_all(bench, deadline)
    write_json(args.json, {"pixels": pixels, "quick": args.quick, **report})
    print("\n".join(["", *table(report)]))


if __name__ == "__main__":
    sys.exit(run_script(main))
