"""Finished runs with random predictions, written by the real code but without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.data.splits import Splits
from lab.data.types import Split
from lab.engine.evaluation import Predictions
from lab.report import mistakes

HOSTILE = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "$\\frac{", '"\'`&amp;',
    "new\nline\x1b[31m", "\udcff not UTF-8", "{{ 7 * 7 }}", "猫", "a long name " * 20, "",
)  # fmt: skip


def splits(names: Sequence[str], num_test: int, size: int = 16, in_chans: int = 3) -> Splits:
    """Return splits of random images: `num_test` for the test, 80 for training."""
    noise = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        shape = (count, in_chans, size, size)
        images = torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)
        return Split(images, torch.arange(count) % len(names), tuple(names))

    train, test = split(80), split(num_test)
    return Splits(train, test, test, (0.5,) * in_chans, (0.25,) * in_chans, "validation", {})


def predicted(split: Split, right: float = 0.6) -> Predictions:
    """Return predictions of which about `right` are correct and the rest are random."""
    random, num_classes = torch.Generator().manual_seed(1), len(split.class_names)
    size = len(split.labels)
    classes = torch.randint(0, num_classes, (size,), generator=random)
    classes = torch.where(torch.rand(size, generator=random) < right, split.labels, classes)
    logits = torch.rand(size, num_classes, generator=random) + 3 * F.one_hot(classes, num_classes)
    confidence, losses = torch.rand(2, size, generator=random, dtype=torch.float64)
    ranks = (classes != split.labels).long()
    names = split.class_names
    return Predictions(split.labels, classes, confidence, losses, ranks, logits, names)


def make_run(
    path: Path, names: Sequence[str] = HOSTILE, num_test: int = 500, size: int = 16, **settings
) -> Path:
    """Write a finished run with these class names; return its directory."""
    overrides = {"model": "lenet5", "dataset": "digits", "image_size": size, **settings}
    config = recipes.resolve(overrides)
    data = splits(names, num_test, size)
    predictions = predicted(data.test)
    path.mkdir(parents=True)
    run = RunDir(path)
    device = {"device": "cpu", "device_name": "<b>a processor</b>", "world_size": 2,
             "precision": "float32", "parameters": 61_706, "macs": None}  # fmt: skip
    run.create(asdict(config) | device)
    for epoch in (1, 2, 3):
        run.add_epoch(
            {
                "epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": 1 - 0.5 / epoch,
                "val_loss": 1.1 / epoch, "val_accuracy": 0.9 - 0.4 / epoch, "val_macro_f1": 0.5,
                "learning_rate": 0.1 / epoch, "train_seconds": 1.5, "eval_seconds": 0.5,
                "images_per_second": 1000.0,
            }
        )  # fmt: skip
        run.add_steps({"step": 10 * epoch, "epoch": epoch, "loss": 1, "learning_rate": 0.1 / epoch})
    run.write_report(
        {"split": "test", **predictions.report(), "best_epoch": 3, "selection_split": "validation"}
    )
    run.write_predictions(predictions.csv(), predictions.safetensors())
    mistakes.save_images(run, config, data, predictions)
    return path
