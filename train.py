"""Trains an image classifier, on one process or many, and tests its best epoch.

  python train.py                          LeNet-5 on MNIST
  python train.py --dataset digits         ... on bundled handwritten digits: no download
  python train.py --model alexnet          AlexNet on CIFAR-10
  python train.py --model alexnet --dataset folder --data-dir PICTURES
  python train.py --model efficientnet_b0 --pretrained  EfficientNet-B0, from ImageNet's weights
  python train.py --resume runs/lenet5-mnist         ... goes on with a run that was stopped
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py --model alexnet

The run's folder, runs/MODEL-DATASET, gets config.json, history.jsonl, steps.jsonl,
best.safetensors, report.json, predictions.csv, report.html to look at and its plots/, README.md
(a model card), and in state/ what it takes to go on.
"""

import shlex
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

from lab import console
from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.config.cli import parse_arguments
from lab.config.schema import TrainConfig
from lab.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line `argv` says; the exit code. Raises `UserError`."""
    return train(parse_arguments(TrainConfig, argv, prog="train.py", description=__doc__))[0]


def train(overrides: dict[str, Any]) -> tuple[int, RunDir]:
    """Trains with the settings that were `given`: (exit code, the run). Raises `UserError`."""
    with ExitStack() as stack:
        return _train(overrides, stack)


def _train(overrides: dict[str, Any], stack: ExitStack) -> tuple[int, RunDir]:
    """`train`; what is entered into `stack` is closed however the training ends."""
    began = time.monotonic()
    config = recipes.resolve(overrides)

    # PyTorch takes seconds to import: --help and a mistyped option are answered before.
    import torch
    from lab.models.model_stats import model_stats

    from lab import loggers as loggers_module
    from lab.checkpoint import init_weights, manager, train_state, weights
    from lab.checkpoint.interrupt import InterruptHandler
    from lab.checkpoint.train_state import TrainState
    from lab.data import DataConfig, list_samples, load_splits
    from lab.data.loaders import build_loader
    from lab.data.transforms import BatchTransform
    from lab.distributed import (
        build_accelerator,
        check_same_data,
        describe,
        device_summary,
        init_distributed,
        loader_place,
        raise_on_all_ranks,
    )
    from lab.engine.evaluation import eval_batch_size, predict_all
    from lab.engine.metrics import is_better, selection_bias_note
    from lab.engine.training import prepare, train_one_epoch
    from lab.models import build_model, find_model
    from lab.report import hub, model_card
    from lab.report.html import finish

    world = init_distributed(config.timeout_seconds, config.quiet)
    with raise_on_all_ranks(world):
        # Locked first: whether the run is resumed or begun is decided once, by one training.
        opened = train_state.open_run(config, is_main_process=world.is_main_process)
        run, state = stack.enter_context(opened)
    state = train_state.broadcast_checkpoint(state)  # None: a new run
    if state:
        run, config = state.run, state.config(overrides)
    with raise_on_all_ranks(
        world
    ):  # what would be missed only once the run is begun, or at its end
        loggers_module.check_packages(config, needed=world.is_main_process)
        hub.check_upload(config, needed=world.is_main_process)
    if state and state.is_finished(config):
        console.info(f"{run.path} is finished; raise --epochs or --max-steps to train it further")
        manager.remove_checkpoints(run, config.final_checkpoints)
        hub.upload(run, config)
        return 0, run
    if state:
        console.info(f"going on from {state.path}")

    accelerator = build_accelerator(
        mixed_precision=config.mixed_precision,
        trained_precision=state.metadata["precision"] if state else None,
        benefits_from_bf16=find_model(config.model).benefits_from_bf16,
        cpu_bf16=find_model(config.model).cpu_bf16,
        threads=config.threads,
        deterministic=config.deterministic,
        comm_hook=config.comm_hook,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    place = loader_place(accelerator, config.loader, config.workers, config.cuda_graphs)
    data_config = DataConfig.of(config)
    with raise_on_all_ranks(accelerator), console.status(f"reading {config.dataset}"):
        splits = load_splits(data_config, place["memory"], torch.get_num_threads())
    check_same_data(accelerator, splits.fingerprints, partial(list_samples, data_config))
    place["kind"] = splits.choose_loader(place["kind"], place["memory"])
    with raise_on_all_ranks(accelerator):
        if state:
            state.check_same_splits(splits)
        augment = BatchTransform(
            splits.mean, splits.std, config.augmentations, accelerator.device, config.mixup_alpha
        )
        plain = BatchTransform(splits.mean, splits.std, (), accelerator.device)
        train_loader = build_loader(
            splits.train,
            augment,
            batch_size=config.batch_size,
            seed=config.seed,
            num_parts=config.grad_accum_steps,
            **place,
        )
        size = eval_batch_size(accelerator.device, config.image_size)
        val_loader = test_loader = build_loader(
            splits.val, plain, batch_size=size, seed=None, **place
        )
        if splits.test is not splits.val:
            test_loader = build_loader(splits.test, plain, batch_size=size, seed=None, **place)
        metadata = weights.run_metadata(config, splits, accelerator.mixed_precision)
        torch.manual_seed(config.seed)
        model = build_model(**metadata["model"], init=config.init)
        if not state:  # which holds the weights to go on from
            init_weights.start_from(model, metadata["model"], config)
            init_weights.warn_of_few_steps(config, train_loader.plan.num_batches)
        init_weights.freeze(model, metadata["model"], config.freeze)
    train_step = prepare(accelerator, model, config)
    position, best = TrainState(), {}
    settings = asdict(config) | describe(accelerator) | model_stats(**metadata["model"])
    settings["fingerprints"] = splits.fingerprints
    with raise_on_all_ranks(accelerator):  # last: a run that cannot start replaces no other
        if state:
            best = state.metadata["best"]
            position = manager.restore(train_step, state)
            run.resume(settings, position.epoch, position.step)
        else:
            manager.check_room(train_step)
            run.create(settings)
        told = settings | {"selection_split": splits.selection_split}
        loggers = loggers_module.Loggers(run, told, position.step)

    def on_log(row: dict) -> None:
        run.add_steps(row)
        loggers.step(row)

    console.settings(
        f"{config.model} on {config.dataset}", overview(config, splits, device_summary(accelerator))
    )
    if config.dataset == "folder":
        console.class_counts(splits.train.class_names, splits.class_counts())

    with (
        InterruptHandler(accelerator, began, config.max_hours, position.step) as interrupts,
        loggers,
        manager.AsyncWriter() as writer,
        manager.CheckpointManager(
            run, writer, interrupts, train_step, splits, position.step
        ) as kept,
        closing(train_loader),
        closing(val_loader),
    ):
        best_weights = weights.BestWeights(run, writer)
        while position.epoch <= config.epochs:
            num_steps = train_loader.plan.num_batches
            title = f"epoch {position.epoch}/{config.epochs}"
            with console.progress(title, num_steps) as progress:
                trained = train_one_epoch(
                    train_step,
                    train_loader,
                    position,
                    progress.update,
                    on_log,
                    partial(kept.after_step, best),
                )
            if trained is None:
                break
            if position.skipped_steps:
                console.warn(
                    f"epoch {position.epoch}: {position.skipped_steps} of {position.batch} steps "
                    "were skipped, as their loss or gradient was not finite"
                )
            kept.save(best, position)
            start = time.perf_counter()
            scores = predict_all(accelerator, train_step.eval_model, val_loader).scores()
            row: dict[str, Any] = {
                "epoch": position.epoch,
                "train_loss": trained.loss,
                "train_accuracy": trained.accuracy,
                "val_loss": scores["loss"],
                "val_accuracy": scores["accuracy"],
                "val_macro_f1": scores["macro_f1"],
                "learning_rate": trained.learning_rate,
                "skipped_steps": position.skipped_steps,
                "train_seconds": trained.seconds,
                "eval_seconds": time.perf_counter() - start,
                "images_per_second": trained.images_per_second,
            }
            # Where --max-steps ended an epoch early, its weights are chosen only if there are no
            # others: resuming the run completes that epoch and evaluates it again.
            complete = position.batch == num_steps
            improved = (complete or not best) and is_better(row, best, config.monitor)
            if improved:
                best = row
                best_weights.save(train_step.eval_model, metadata, row)
            run.add_epoch(row)
            loggers.epoch(row, position.step)
            console.epoch_row(row, improved, splits.selection_split)
            if kept.after_epoch(position):
                break
            if config.max_steps and position.step >= config.max_steps:
                break
            if config.patience and position.epoch - best["epoch"] >= config.patience:
                console.info(f"stopped: no better epoch in the last {config.patience}")
                break
            position = position.next_epoch()

        if not kept.reason:
            # The test split is read here, once, by the weights as their file holds them.
            best_weights.load(accelerator, train_step.eval_model)
    if kept.reason:
        loggers.finish()
        return kept.report_interruption(), run
    with raise_on_all_ranks(accelerator):
        run.check_learnt()
    with closing(test_loader):
        predictions = predict_all(accelerator, train_step.eval_model, test_loader)
    report = {
        "split": "test",
        **predictions.report(),
        "best_epoch": best["epoch"],
        "selection_split": splits.selection_split,
    }
    with raise_on_all_ranks(accelerator):  # the report last: where it is, the run is finished
        run.write_predictions(predictions.csv(splits.test.files()))
        run.write_report(report)
    console.report(
        report,
        title=f"{config.model} on {config.dataset}",
        files={"run": str(run.path)},
        command=f"python evaluate.py {shlex.quote(str(run.path))}",
        note=selection_bias_note("test", splits.selection_split),
    )
    finish(run, config, splits, predictions)
    with raise_on_all_ranks(accelerator):
        model_card.write(run)
    loggers.finish(report, position.step)
    manager.remove_checkpoints(run, config.final_checkpoints)
    hub.upload(run, config)
    return 0, run


def overview(config, splits, place: str) -> dict[str, str]:
    """What was chosen, for the console."""
    num_train, num_val, num_test = (
        f"{len(split.labels):,}" for split in (splits.train, splits.val, splits.test)
    )
    limits = {
        "--max-train-samples": config.max_train_samples,
        "--max-eval-samples": config.max_eval_samples,
    }
    cut = ", ".join(f"{flag} {limit}" for flag, limit in limits.items() if limit)
    return {
        "samples": f"{num_train} train, {num_val} {splits.selection_split}, {num_test} test"
        + (f" ({cut})" if cut else ""),
        "recipe": f"{config.recipe}: {config.epochs} epoch{'s' if config.epochs > 1 else ''}"
        + (f", at most {config.max_steps} steps" if config.max_steps else "")
        + f", batches of {config.batch_size}, "
        f"{config.optimizer}, lr {config.lr:g} {config.schedule}, augment {config.augment}",
        "place": place,
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
