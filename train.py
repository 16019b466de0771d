"""Train an image classifier on one process or many, and test its best epoch.

  python train.py                          LeNet-5 on MNIST
  python train.py --dataset digits         LeNet-5 on the bundled digits, without a download
  python train.py --model alexnet          AlexNet on CIFAR-10
  python train.py --dataset IMAGES         fine-tune on your images, IMAGES/CLASS/*.jpg
  python train.py --model efficientnet_b0 --pretrained
  python train.py --resume runs/lenet5-mnist
  python train.py --config runs/lenet5-mnist/config.json --seed 1
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py --model alexnet

The run directory, runs/MODEL-DATASET, contains config.json, history.jsonl, steps.jsonl,
best.safetensors, report.json, predictions.csv, report.html, plots/, README.md (a model card), and
checkpoints/ to resume from. In Python, train.main(["--dataset", "digits"]) returns the run.
"""

import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

from lab import console, own_code
from lab.checkpoint.run_dir import RunDir
from lab.config.cli import parse_arguments, print_config
from lab.config.recipes import resolve, resolve_epochs
from lab.config.schema import TrainConfig
from lab.data import DataConfig, check_dataset, is_named
from lab.errors import run_script
from lab.models import check_model, with_input_defaults


def main(argv: list[str] | None = None, model=None, datasets=None) -> RunDir:
    """Train with the arguments `argv`, and return the run directory. Raises `UserError`.

    `model` is a module or a function (num_classes, in_chans, image_size) that returns one, instead
    of --model. `datasets`, instead of --dataset, is what a function of your own may return, see
    docs/extending.md.
    """
    start_time = time.monotonic()
    overrides = parse_arguments(TrainConfig, argv, prog="train.py", description=__doc__)
    print_only = overrides.pop("print_config", False)
    if model is not None:
        from lab.models.own import register_object

        overrides["model"] = register_object(model)
    if datasets is not None:
        overrides["dataset"] = own_code.register(own_code.DATASETS, datasets)
    config = resolve(overrides)
    check_dataset(config.dataset, overrides)
    check_model(config.model, config.pretrained)
    config = with_input_defaults(config)
    if print_only:
        print_config(config)  # and exit

    # Importing PyTorch takes seconds: --help and command-line mistakes are answered before.
    from lab.checkpoint.manager import open_run
    from lab.distributed import init_distributed, raise_on_all_ranks
    from lab.loggers import check_packages
    from lab.report import hub

    world = init_distributed(config.timeout_seconds, config.quiet)
    with open_run(config, overrides, world) as (run, config, checkpoint):
        with raise_on_all_ranks(world):  # these would otherwise fail at the end of the run
            check_packages(config, needed=world.is_main_process)
            hub.check_upload(config, needed=world.is_main_process)
        if checkpoint and (limit := checkpoint.reached_limit(config)):
            console.info(f"{run.path} is finished; to train it further, raise {limit}")
        else:
            # A checkpoint may come from a stranger: download and import nothing that it names.
            download = not checkpoint or is_named(config.dataset, overrides)
            train(run, config, checkpoint, start_time, download)
        if not run.interrupted:
            hub.upload(run, config)
    return run


def train(run, config, checkpoint, start_time, download):
    """Train and test a model. `checkpoint` is the one to resume from, or None for a new run."""
    import torch
    from accelerate.utils import set_seed

    from lab.checkpoint.atomic_io import AsyncWriter
    from lab.checkpoint.init_weights import build_initial_model, initial_normalization
    from lab.checkpoint.interrupt import InterruptHandler
    from lab.checkpoint.manager import CheckpointManager, begin_run
    from lab.checkpoint.weights import BestWeights, run_metadata
    from lab.data.loaders import LoaderOptions, build_loaders
    from lab.data.splits import load_splits
    from lab.distributed import build_accelerator, check_same_data, describe, raise_on_all_ranks
    from lab.engine.ema import ModelEma
    from lab.engine.evaluation import predict_all
    from lab.engine.linear_probe import find_classifier, fit_classifier
    from lab.engine.metrics import is_better
    from lab.engine.optimizer import build_optimizer
    from lab.engine.training import TrainStep, configure_model, history_row, train_one_epoch
    from lab.loggers import Loggers
    from lab.models import find_model
    from lab.models.stats import model_stats
    from lab.report.results import write_results

    # Distributed setup
    accelerator = build_accelerator(
        mixed_precision=config.mixed_precision,
        trained_precision=checkpoint.metadata["precision"] if checkpoint else None,
        benefits_from_bf16=find_model(config.model).benefits_from_bf16,
        cpu_bf16=find_model(config.model).cpu_bf16,
        threads=config.threads,
        deterministic=config.deterministic,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )

    # Data
    options = LoaderOptions.create(accelerator, config.loader, config.workers, config.cuda_graphs)
    with raise_on_all_ranks(accelerator), console.status(f"reading {config.dataset}"):
        normalization = initial_normalization(config, checkpoint)
        splits = load_splits(
            DataConfig.of(config), options.memory, torch.get_num_threads(), download,
            config.sample_augmentations, normalization,
        )  # fmt: skip
    check_same_data(accelerator, splits.fingerprints)
    if checkpoint:
        checkpoint.check_same_splits(splits)
    train_loader, val_loader, test_loader = build_loaders(splits, config, options)
    num_steps = train_loader.sampler.num_batches  # of an epoch
    config = replace(resolve_epochs(config, num_steps), revision=splits.revision)

    # Model and optimizer
    metadata = run_metadata(config, splits, accelerator.mixed_precision)
    set_seed(config.seed)
    with raise_on_all_ranks(accelerator):
        model = build_initial_model(metadata["model"], config, bool(checkpoint), num_steps)
        model = configure_model(model, config, accelerator.device)
    probed_layer = find_classifier(config, model, metadata["model"])
    if probed_layer and not checkpoint:
        fit_classifier(accelerator, model, probed_layer, splits, config, options)
    ema = None
    if config.ema_decay:
        ema = ModelEma(model, config.ema_decay, warmup=not probed_layer)
    optimizer = build_optimizer(model, config, accelerator)
    wrapped_model = accelerator.prepare(model)
    if accelerator.scaler:  # fp16 needs Accelerate's wrapper; otherwise it only slows each step
        optimizer = accelerator.prepare(optimizer)
    train_step = TrainStep(accelerator, config, model, wrapped_model, optimizer, ema)

    # Run directory
    settings = asdict(config) | describe(accelerator) | model_stats(**metadata["model"])
    settings["fingerprints"] = splits.fingerprints
    with raise_on_all_ranks(accelerator):  # last: a run that fails before must not replace another
        state, best = begin_run(run, train_step, checkpoint, settings)
        loggers = Loggers(run, settings | {"selection_split": splits.selection_split}, state.step)
    console.run_summary(config, splits, train_loader, describe(accelerator))

    # Training loop
    with (
        InterruptHandler(accelerator, start_time, config.max_hours, state.step) as interrupts,
        loggers,
        AsyncWriter() as writer,
        CheckpointManager(run, writer, interrupts, train_step, splits, state.step) as checkpoints,
        closing(train_loader),
        closing(val_loader),
    ):
        best_weights = BestWeights(run, writer)
        while state.epoch <= config.epochs:
            title = f"epoch {state.epoch}/{config.epochs}"
            with console.progress(title, num_steps) as progress:
                metrics = train_one_epoch(
                    train_step, train_loader, state, on_step=progress.update, on_log=loggers.step,
                    should_stop=partial(checkpoints.after_step, best),
                )  # fmt: skip
            if metrics is None:
                break
            checkpoints.save(best, state)
            eval_start = time.perf_counter()
            scores = predict_all(accelerator, train_step.eval_model, val_loader).scores()
            row = history_row(state, metrics, scores, time.perf_counter() - eval_start)
            # An epoch that --max-steps ended early is selected only if it is the first: resuming
            # the run completes that epoch and evaluates it again.
            complete = state.batch == num_steps
            improved = (complete or not best) and is_better(row, best, config.monitor)
            if improved:
                best = row
                best_weights.save(train_step.eval_model, metadata, row)
            loggers.epoch(row, state.step)
            console.epoch_row(row, improved, splits.selection_split)
            at_max_steps = config.max_steps and state.step >= config.max_steps
            if checkpoints.after_epoch(state) or at_max_steps:
                break
            if config.patience and state.epoch - best["epoch"] >= config.patience:
                console.info(f"stopped: no better epoch in the last {config.patience}")
                break
            state = state.next_epoch()
        if not checkpoints.stop_reason:
            temperature = best_weights.load(accelerator, train_step.eval_model)

    # Test: the test split is read once, with the saved weights of the best epoch.
    if checkpoints.stop_reason:
        checkpoints.report_interruption()
        loggers.finish()
        return
    run.check_trained(accelerator)
    with closing(test_loader):
        predictions = predict_all(
            accelerator, train_step.eval_model, test_loader, temperature=temperature
        )
    report = write_results(
        accelerator, run, config, splits, predictions, best["epoch"], temperature
    )
    loggers.finish(report, state.step)


if __name__ == "__main__":
    sys.exit(run_script(lambda: main().exit_code))
