"""Trains an image classifier, on one process or many, and tests its best epoch.

  python train.py                          LeNet-5 on MNIST
  python train.py --dataset digits         ... on bundled handwritten digits: no download
  python train.py --model alexnet          AlexNet on CIFAR-10
  python train.py --model alexnet --dataset folder --data-dir PICTURES
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py --model alexnet

The run's folder, runs/MODEL-DATASET, gets config.json, history.jsonl, steps.jsonl,
best.safetensors, report.json and predictions.csv.
"""

import shlex
import sys
import time
from dataclasses import asdict

from lab import console, recipes
from lab.commandline import parse_arguments
from lab.config import EVAL_BATCH_SIZE, TrainConfig
from lab.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line `argv` says; raises `UserError`."""
    given = parse_arguments(TrainConfig, argv, prog="train.py", about=__doc__)
    config = recipes.resolve(given)

    # PyTorch takes seconds to import: --help and a mistyped option are answered before.
    import torch

    from lab import checkpoint, rundir
    from lab.data import DataConfig, load_splits
    from lab.data.augment import Preprocess
    from lab.data.loaders import build_loader
    from lab.distributed import build_accelerator, describe, loader_place, place_line, together
    from lab.engine import prepare, train_one_epoch
    from lab.evaluation import predict_all
    from lab.metrics import caveat, is_better
    from lab.models import build_model, find_model

    accelerator = build_accelerator(
        mixed_precision=config.mixed_precision,
        large_model=find_model(config.model).large,
        threads=config.threads,
        deterministic=config.deterministic,
        comm_hook=config.comm_hook,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    place = loader_place(accelerator, config.loader, config.workers)
    with together(accelerator):
        with console.working(f"reading {config.dataset}"):
            splits = load_splits(DataConfig.of(config), place["memory"], torch.get_num_threads())
        augment = Preprocess(splits.mean, splits.std, config.augmentations, accelerator.device)
        plain = Preprocess(splits.mean, splits.std, (), accelerator.device)
        train_loader = build_loader(
            splits.train, augment, batch_size=config.batch_size, seed=config.seed, **place
        )
        val_loader = test_loader = build_loader(
            splits.val, plain, batch_size=EVAL_BATCH_SIZE, seed=None, **place
        )
        if splits.test is not splits.val:
            test_loader = build_loader(
                splits.test, plain, batch_size=EVAL_BATCH_SIZE, seed=None, **place
            )
        about = checkpoint.about_run(config, splits, accelerator.mixed_precision)
        torch.manual_seed(config.seed)
        network = build_model(**about["model"], init=config.init)
    trainer = prepare(accelerator, network, config)
    with together(accelerator):  # last: a run that cannot start makes and replaces no folder
        run = rundir.start(config, writes=accelerator.is_main_process)
        run.begin(asdict(config) | describe(accelerator))
    console.settings(
        f"{config.model} on {config.dataset}", overview(config, splits, place_line(accelerator))
    )

    best: dict = {}
    step = 0
    with checkpoint.BestWeights(run) as best_weights:
        for epoch in range(1, config.epochs + 1):
            num_steps = train_loader.plan.num_batches
            with console.epoch_progress(epoch, config.epochs, num_steps) as progress:
                trained = train_one_epoch(
                    trainer, train_loader, epoch, step, progress.update, run.add_steps
                )
            step = trained.step
            start = time.perf_counter()
            scores = predict_all(accelerator, trainer.evaluated, val_loader).report()
            row = {
                "epoch": epoch,
                "train_loss": trained.loss,
                "train_accuracy": trained.accuracy,
                "val_loss": scores["loss"],
                "val_accuracy": scores["accuracy"],
                "val_macro_f1": scores["macro_f1"],
                "learning_rate": trained.learning_rate,
                "train_seconds": trained.seconds,
                "eval_seconds": time.perf_counter() - start,
                "images_per_second": trained.images_per_second,
            }
            improved = is_better(row, best, config.select_by)
            if improved:
                best = row
                best_weights.save(trainer.evaluated, about, row)
            run.add_epoch(row)
            console.epoch_row(row, improved, splits.selected_on)
            if config.max_steps and step >= config.max_steps:
                break

        # The test split is read here, once, by the weights as their file holds them.
        best_weights.load(accelerator, trainer.evaluated)
    predictions = predict_all(accelerator, trainer.evaluated, test_loader)
    report = {
        "split": "test",
        **predictions.report(),
        "best_epoch": best["epoch"],
        "selected_on": splits.selected_on,
    }
    console.report(
        report,
        title=f"{config.model} on {config.dataset}",
        files={"run": str(run.path)},
        command=f"python evaluate.py {shlex.quote(str(run.path))}",
        note=caveat("test", splits.selected_on),
    )
    with together(accelerator):
        run.write_report(report)
        run.write_predictions(predictions.rows())
    accelerator.end_training()


def overview(config, splits, place: str) -> dict[str, str]:
    """What was chosen, for the console."""
    num_train, num_val, num_test = (
        f"{len(split.labels):,}" for split in (splits.train, splits.val, splits.test)
    )
    return {
        "samples": f"{num_train} train, {num_val} {splits.selected_on}, {num_test} test",
        "recipe": f"{config.recipe}: {config.epochs} epochs"
        + (f", at most {config.max_steps} steps" if config.max_steps else "")
        + f", batches of {config.batch_size}, "
        f"{config.optimizer}, lr {config.lr:g} {config.schedule}, augment {config.augment}",
        "place": place,
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
