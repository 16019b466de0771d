"""Measure what a dataset of millions of files costs before and in an epoch, without its images.

  python benchmarks/scale.py
  python benchmarks/scale.py --files 20000 --json benchmarks/logs/scale.json

Paths, sizes and labels of 1, 3 and 10 million images of 1,000 classes are made up; only a CSV
manifest of them is read. "directory" writes --files tiny files and reads them as a
directory of images. "results" writes and reads the results of a test split of that many images, 10
classes. Each part has a process of its own, and its steps are measured in wall-clock and CPU
seconds and in the peak memory that they add. Takes 20 minutes on 2 cores and 8 GB of memory.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, child, write_json

NUM_CLASSES = 1000
WORLD_SIZE, RANKS = 64, (0, 31, 63)  # the ranks whose work is measured
BATCH_SIZE = 4096


def names(num_files: int) -> Iterator[str]:
    """Yield made-up file names like those of ImageNet, 33 bytes long."""
    for i in range(num_files):
        label = i * NUM_CLASSES // num_files
        yield f"n{label:08}/n{label:08}_{i:08}.JPEG"


def made_up_stats(paths: Any) -> Any:
    """Return sizes and times of files that do not exist, as `lab.data.cache.stat_files` does."""
    import torch

    stats = torch.zeros(len(paths), 3, dtype=torch.int64)
    stats[:, 0] = torch.arange(len(paths)) * 7919 % 200_003 + 1
    return stats


@contextmanager
def measure(name: str, measured: dict[str, Any], num: int = 1) -> Iterator[None]:
    """Add the seconds of the block, divided by `num`, and its peak memory to `measured`."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # peak memory starts again at the memory now
    wall, cpu, before = time.perf_counter(), time.process_time(), peak_mb()
    yield
    seconds = (time.perf_counter() - wall) / num, (time.process_time() - cpu) / num
    measured[name] = {
        "seconds": round(seconds[0], 3),
        "cpu_seconds": round(seconds[1], 3),
        "peak_mb": round(peak_mb() - before),
    }


def peak_mb() -> float:
    """Return the peak memory of this process since it was last reset, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def dataset(num_files: int, folder: Path) -> dict[str, Any]:
    """Measure what happens to a list of files before the first epoch."""
    import torch

    from lab.data import DataConfig, cache, checks, fingerprint, image_folder
    from lab.data.stratification import stratified_split, subsample
    from lab.data.types import RawSplits
    from lab.data.workers import BatchReader

    measured: dict[str, Any] = {}
    image_folder.stat_files = made_up_stats  # no file exists
    fingerprint._content = lambda split, position: b""
    checks._file_digest = lambda path, *_: (hash(path), 1)  # no two files are equal
    manifest = folder / "manifest.csv"
    with open(manifest, "w") as file:
        file.write("file,label\n")
        file.writelines(f"{name},{name[:9]}\n" for name in names(num_files))
    config = DataConfig(str(manifest), "", 224, 0.1, 0.2, 0, 0, 0)
    with measure("read a manifest", measured):
        split = image_folder.read_folder(config).train
    with measure("key of a cached result", measured):
        cache.key_of(split.paths, split.images.stats, 224)
    with measure("find equal files, without reading", measured):
        checks.identical_files(RawSplits(split))
    with measure("hold out a test split", measured):
        stratified_split(split, 0.2, 0)
    with measure("sample 10,000", measured):
        subsample(split, 10_000, 0)
    with measure("fingerprint", measured):
        fingerprint.fingerprint(split)
    with (
        measure("a worker process that has read every path", measured),
        BatchReader(PathReader(split.images.paths), 1) as reader,
    ):
        [memory] = reader.read([torch.arange(1)])
    measured["a worker process that has read every path"]["worker_mb"] = round(memory)
    return measured


@dataclass
class PathReader:
    """Read every path in a worker process, and return the memory that it then has for itself."""

    paths: Sequence[str]

    def __call__(self, _: Any) -> float:
        before = private_mb()
        assert all(self.paths[i] for i in range(len(self.paths)))
        return private_mb() - before


def private_mb() -> float:
    """Return the memory of this process that no other process shares, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def orders(num_samples: int, folder: Path) -> dict[str, Any]:
    """Measure what a process does in an epoch besides reading, augmenting and training."""
    import torch

    from lab.data.loaders import StreamingLoader
    from lab.data.sampler import ShardedBatchSampler, balanced_class_weights
    from lab.data.transforms import BatchTransform
    from lab.data.types import Split

    measured: dict[str, Any] = {}
    labels = torch.arange(num_samples) * NUM_CLASSES // num_samples
    class_names = tuple(map(str, range(NUM_CLASSES)))
    transform = BatchTransform((0.5,) * 3, (0.2,) * 3, ("flip",), "cpu")

    class NoImages:
        def __getitem__(self, index: Any) -> Any:
            return torch.zeros(len(index), 3, 1, 1, dtype=torch.uint8)

    split = Split(NoImages(), labels, class_names)
    weights = balanced_class_weights(labels, NUM_CLASSES)

    def first_batch(**options: Any) -> None:
        for rank in RANKS:
            sampler = ShardedBatchSampler(
                num_samples, BATCH_SIZE, 0, rank, WORLD_SIZE, labels=labels, **options
            )
            loader = StreamingLoader(split, sampler, transform, torch.device("cpu"), 0)
            next(loader.batches(1))

    with measure("first batch of an epoch", measured, num=len(RANKS)):
        first_batch()
    with measure("with class weights", measured, num=len(RANKS)):
        first_batch(class_weights=weights)
    with measure("with balanced sampling", measured, num=len(RANKS)):
        first_batch(balanced_sampling=True)
    sampler = ShardedBatchSampler(num_samples, BATCH_SIZE, 0, WORLD_SIZE - 1, WORLD_SIZE)
    with measure("all slices of an epoch", measured):
        order = sampler.order(1)
        assert sum(len(sampler.take(order, s, False)) for s in sampler.slices())
    return measured


def results(num_samples: int, folder: Path) -> dict[str, Any]:
    """Measure the files of a finished run with a large test split."""
    import torch

    from lab.checkpoint.run_dir import PAGE, PREDICTIONS, PROBABILITIES, REPORT
    from lab.engine.evaluation import Predictions
    from lab.report import html, plots
    from lab.report.run_reader import read_run

    measured: dict[str, Any] = {}
    run = folder / "run"
    shutil.copytree(ROOT / "results" / "lenet5-digits-demo", run)
    torch.manual_seed(0)
    labels = torch.randint(10, (num_samples,))
    logits = torch.randn(num_samples, 10)
    logits[torch.arange(num_samples), labels] += 3
    confidence, predicted = logits.softmax(1).double().max(1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    class_names = tuple("0123456789")
    predictions = Predictions(labels, predicted, confidence, losses, ranks, logits, class_names)
    files = list(names(num_samples))
    with measure("metrics", measured):
        report = predictions.report()
    report = json.loads((run / REPORT).read_text()) | report
    (run / REPORT).write_text(json.dumps(report))
    with measure("predictions.csv", measured):
        content = predictions.csv(files)
    (run / PREDICTIONS).write_bytes(content)
    with measure("predictions.safetensors", measured):
        (run / PROBABILITIES).write_bytes(predictions.safetensors())
    with measure("read the run", measured):
        read_run(run)
    with measure("plots", measured):
        plots.draw(run)
    with measure("report.html", measured):
        html.write(run)
    sizes = {name: (run / name).stat().st_size for name in (PAGE, PREDICTIONS, PROBABILITIES)}
    measured["bytes"] = sizes
    return measured


def directory(num_files: int, folder: Path) -> dict[str, Any]:
    """Measure reading a directory of real files, each with its own name as content."""
    from lab.data import DataConfig, cache, checks, image_folder

    measured: dict[str, Any] = {}
    for label in range(NUM_CLASSES):
        (folder / f"n{label:08}").mkdir()
    for name in names(num_files):
        (folder / name).write_text(name)
    os.sync()
    config = DataConfig(str(folder), "", 224, 0.1, 0.2, 0, 0, 0)
    with measure("list the directory and stat its files", measured):
        raw = image_folder.read_folder(config)
    cache.MIN_IMAGES = num_files + 1  # do not cache
    with measure("find equal files: all have the same size, so all are read", measured):
        checks.identical_files(raw)
    return measured


PARTS = {"dataset": dataset, "orders": orders, "results": results, "directory": directory}


def main() -> None:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 3 * 10**6, 10**7])
    parser.add_argument("--files", type=int, default=20_000, help="files that are written")
    parser.add_argument("--results", type=int, default=10**6, help="test samples")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.part:
        from lab.data import decode  # noqa: F401, so that no part measures the imports

        with tempfile.TemporaryDirectory() as folder:
            os.environ["LAB_CACHE"] = f"{folder}/cache"
            (Path(folder) / "data").mkdir()
            print(json.dumps(PARTS[args.part](args.sizes[0], Path(folder) / "data")))
        return
    measured: dict[str, dict[str, Any]] = {}
    for part in args.parts:
        sizes = {"directory": [args.files], "results": [args.results]}.get(part, args.sizes)
        for size in sizes:
            steps = child(__file__, "--part", part, "--sizes", size)
            measured.setdefault(part, {})[str(size)] = steps
            print(f"{part}, {size:,}")
            for name, step in steps.items():
                print(f"  {name:60} " + "  ".join(f"{k} {v:,}" for k, v in step.items()))
    write_json(args.json, {"results": measured})


if __name__ == "__main__":
    main()
