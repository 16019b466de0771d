"""Trains an image classifier, on one process or many, and tests its best epoch.

  python train.py                          LeNet-5 on MNIST
  python train.py --dataset digits         ... on bundled handwritten digits: no download
  python train.py --model alexnet          AlexNet on CIFAR-10
  python train.py --model alexnet --dataset folder --data-dir PICTURES
  python train.py --model efficientnet --pretrained  EfficientNet-B0, from ImageNet's weights
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

from lab import console, recipes
from lab.commandline import parse_arguments
from lab.config import TrainConfig
from lab.errors import run_script
from lab.rundir import RunDir


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line `argv` says; the exit code. Raises `UserError`."""
    return train(parse_arguments(TrainConfig, argv, prog="train.py", about=__doc__))[0]


def train(given: dict[str, Any]) -> tuple[int, RunDir]:
    """Trains with the settings that were `given`: (exit code, the run). Raises `UserError`."""
    with ExitStack() as stack:
        return _train(given, stack)


def _train(given: dict[str, Any], stack: ExitStack) -> tuple[int, RunDir]:
    """`train`; what is entered into `stack` is closed however the training ends."""
    began = time.monotonic()
    config = recipes.resolve(given)

    # PyTorch takes seconds to import: --help and a mistyped option are answered before.
    import torch

    from lab import card, checkpoint, finetune, hub, keeper, states, tables, tracking
    from lab.data import DataConfig, list_samples, load_splits
    from lab.data.augment import Preprocess
    from lab.data.loaders import build_loader
    from lab.distributed import (
        build_accelerator,
        check_same_data,
        describe,
        join_world,
        loader_place,
        place_line,
        together,
    )
    from lab.engine import Position, prepare, train_one_epoch
    from lab.evaluation import eval_batch_size, predict_all
    from lab.metrics import caveat, is_better
    from lab.models import build_model, find_model
    from lab.models.cost import cost
    from lab.report import finish
    from lab.stopping import Stopper

    world = join_world(config.timeout_seconds, config.quiet)
    with together(world):
        # Locked first: whether the run is resumed or begun is decided once, by one training.
        opened = states.open_run(config, writes=world.is_main_process)
        run, state = stack.enter_context(opened)
    state = states.share(state)  # None: a new run
    if state:
        run, config = state.run, state.config(given)
    with together(world):  # what would be missed only once the run is begun, or at its end
        tracking.require_packages(config, needed=world.is_main_process)
        hub.check_upload(config, needed=world.is_main_process)
    if state and state.is_finished(config):
        console.say(f"{run.path} is finished; raise --epochs or --max-steps to train it further")
        keeper.remove_checkpoints(run, config.final_checkpoints)
        hub.upload(run, config)
        return 0, run
    if state:
        console.say(f"going on from {state.path}")

    accelerator = build_accelerator(
        mixed_precision=config.mixed_precision,
        trained_in=state.about["precision"] if state else None,
        large_model=find_model(config.model).large,
        cpu_bf16=find_model(config.model).cpu_bf16,
        threads=config.threads,
        deterministic=config.deterministic,
        comm_hook=config.comm_hook,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    place = loader_place(accelerator, config.loader, config.workers, config.cuda_graphs)
    data_config = DataConfig.of(config)
    with together(accelerator), console.working(f"reading {config.dataset}"):
        splits = load_splits(data_config, place["memory"], torch.get_num_threads())
    check_same_data(accelerator, splits.fingerprints, partial(list_samples, data_config))
    place["kind"] = splits.choose_loader(place["kind"], place["memory"])
    with together(accelerator):
        if state:
            state.require_same_data(splits)
        augment = Preprocess(
            splits.mean, splits.std, config.augmentations, accelerator.device, config.mix_alpha
        )
        plain = Preprocess(splits.mean, splits.std, (), accelerator.device)
        train_loader = build_loader(
            splits.train,
            augment,
            batch_size=config.batch_size,
            seed=config.seed,
            num_parts=config.accumulate,
            **place,
        )
        size = eval_batch_size(accelerator.device, config.image_size)
        val_loader = test_loader = build_loader(
            splits.val, plain, batch_size=size, seed=None, **place
        )
        if splits.test is not splits.val:
            test_loader = build_loader(splits.test, plain, batch_size=size, seed=None, **place)
        about = checkpoint.about_run(config, splits, accelerator.mixed_precision)
        torch.manual_seed(config.seed)
        network = build_model(**about["model"], init=config.init)
        if not state:  # which holds the weights to go on from
            finetune.start_from(network, about["model"], config)
            finetune.warn_of_few_steps(config, train_loader.plan.num_batches)
        finetune.freeze(network, about["model"], config.freeze)
    trainer = prepare(accelerator, network, config)
    position, best = Position(), {}
    settings = asdict(config) | describe(accelerator) | cost(**about["model"])
    settings["fingerprints"] = splits.fingerprints
    with together(accelerator):  # last: a run that cannot start replaces no other
        if state:
            best = state.about["best"]
            position = keeper.restore(trainer, state)
            run.go_on(settings, position.epoch, position.step)
        else:
            keeper.require_room_for(trainer)
            run.begin(settings)
        told = settings | {"selected_on": splits.selected_on}
        tracked = tracking.Tracking(run, told, position.step)

    def on_log(row: dict) -> None:
        run.add_steps(row)
        tracked.step(row)

    console.settings(
        f"{config.model} on {config.dataset}", overview(config, splits, place_line(accelerator))
    )
    if config.dataset == "folder":
        tables.class_counts(splits.train.class_names, splits.class_counts())

    with (
        Stopper(accelerator, began, config.max_hours, position.step) as stopper,
        tracked,
        checkpoint.Writer() as writer,
        keeper.Keeper(run, writer, stopper, trainer, splits, position.step) as kept,
        closing(train_loader),
        closing(val_loader),
    ):
        best_weights = checkpoint.BestWeights(run, writer)
        while position.epoch <= config.epochs:
            num_steps = train_loader.plan.num_batches
            title = f"epoch {position.epoch}/{config.epochs}"
            with console.progress(title, num_steps) as progress:
                trained = train_one_epoch(
                    trainer,
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
            scores = predict_all(accelerator, trainer.evaluated, val_loader).scores()
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
            improved = (complete or not best) and is_better(row, best, config.select_by)
            if improved:
                best = row
                best_weights.save(trainer.evaluated, about, row)
            run.add_epoch(row)
            tracked.epoch(row, position.step)
            console.epoch_row(row, improved, splits.selected_on)
            if kept.after_epoch(position):
                break
            if config.max_steps and position.step >= config.max_steps:
                break
            if config.patience and position.epoch - best["epoch"] >= config.patience:
                console.say(f"stopped: no better epoch in the last {config.patience}")
                break
            position = position.next_epoch()

        if not kept.reason:
            # The test split is read here, once, by the weights as their file holds them.
            best_weights.load(accelerator, trainer.evaluated)
    if kept.reason:
        tracked.finish()
        return kept.goodbye(), run
    with together(accelerator):
        run.check_learnt()
    with closing(test_loader):
        predictions = predict_all(accelerator, trainer.evaluated, test_loader)
    report = {
        "split": "test",
        **predictions.report(),
        "best_epoch": best["epoch"],
        "selected_on": splits.selected_on,
    }
    with together(accelerator):  # the report last: where it is, the run is finished
        run.write_predictions(predictions.csv(splits.test.files()))
        run.write_report(report)
    console.report(
        report,
        title=f"{config.model} on {config.dataset}",
        files={"run": str(run.path)},
        command=f"python evaluate.py {shlex.quote(str(run.path))}",
        note=caveat("test", splits.selected_on),
    )
    finish(run, config, splits, predictions)
    with together(accelerator):
        card.write(run)
    tracked.finish(report, position.step)
    keeper.remove_checkpoints(run, config.final_checkpoints)
    hub.upload(run, config)
    return 0, run


def overview(config, splits, place: str) -> dict[str, str]:
    """What was chosen, for the console."""
    num_train, num_val, num_test = (
        f"{len(split.labels):,}" for split in (splits.train, splits.val, splits.test)
    )
    limits = {"--limit-train": config.limit_train, "--limit-eval": config.limit_eval}
    cut = ", ".join(f"{flag} {limit}" for flag, limit in limits.items() if limit)
    return {
        "samples": f"{num_train} train, {num_val} {splits.selected_on}, {num_test} test"
        + (f" ({cut})" if cut else ""),
        "recipe": f"{config.recipe}: {config.epochs} epoch{'s' if config.epochs > 1 else ''}"
        + (f", at most {config.max_steps} steps" if config.max_steps else "")
        + f", batches of {config.batch_size}, "
        f"{config.optimizer}, lr {config.lr:g} {config.schedule}, augment {config.augment}",
        "place": place,
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
