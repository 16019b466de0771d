"""Evaluate saved weights on a split: exact metrics, metrics per class, confusion matrix.

  python evaluate.py runs/lenet5-mnist                   test split of the training dataset
  python evaluate.py best.safetensors --split val        another split, from the file alone
  python evaluate.py best.safetensors --dataset IMAGES --split all
  python evaluate.py runs/alexnet-cifar10 --tta flip     also with test-time augmentation
  python evaluate.py runs/lenet5-mnist --calibrate       fit the confidence on validation
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml evaluate.py runs/lenet5-mnist

Writes report.json, predictions.csv and predictions.safetensors, which holds the probabilities. The
results do not depend on the number of processes.

--calibrate stores a temperature in the weights (Guo et al. 2017), which this script, predict.py and
export.py divide the logits by: confidence becomes comparable with accuracy, no prediction changes.
"""

import sys
from contextlib import closing
from dataclasses import replace
from functools import partial

from lab import console
from lab.config.cli import parse_arguments
from lab.config.schema import EvalConfig, dataset_title
from lab.errors import UserError, name_some, run_script


def main(argv: list[str] | None = None) -> None:
    """Evaluate weights as the command line `argv` says. Raises `UserError`."""
    config = EvalConfig(
        **parse_arguments(EvalConfig, argv, prog="evaluate.py", description=__doc__)
    )

    # Importing PyTorch takes seconds: --help and command-line mistakes are answered before.
    import torch

    from lab.checkpoint import run_dir, weights
    from lab.data import (
        DataConfig,
        check_dataset,
        list_samples,
        load_fingerprints,
        load_split,
        read_dataset,
    )
    from lab.data.fingerprint import changed_splits
    from lab.data.loaders import LoaderOptions, build_loader, eval_batch_size
    from lab.data.transforms import BatchTransform
    from lab.distributed import (
        build_accelerator,
        check_same_data,
        describe,
        raise_on_all_ranks,
    )
    from lab.engine.calibration import fit_temperature
    from lab.engine.evaluation import predict_all
    from lab.engine.metrics import selection_bias_note
    from lab.engine.training import to_device

    path = weights.find_weights(config.weights)
    metadata = weights.read_metadata(path)
    model_name = metadata["model"]["name"]
    if config.calibrate and metadata["selection_split"] == "test":
        raise UserError(
            f"--calibrate needs a validation split, and {path} was trained without one",
            "Train with --val-fraction 0.1",
        )
    accelerator = build_accelerator(
        training=False,
        mixed_precision=config.mixed_precision,
        trained_precision=metadata["precision"],
        threads=config.threads,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    options = LoaderOptions.create(accelerator, config.loader, config.workers)
    data = DataConfig(**metadata["data"] | config.data_overrides())
    limits = {name: metadata["data"][name] for name in ("max_train_samples", "max_eval_samples")}
    as_trained = replace(data, **limits)  # with the number of samples of the training
    check_dataset(data.dataset, config.data_dir)
    with raise_on_all_ranks(accelerator):
        model = weights.load_model(path, metadata)
        with console.status(f"reading {data.dataset}"):
            # Download only to a directory that the user names, never to one in the metadata.
            download = config.data_dir is not None
            raw = read_dataset(data, download)
            num_workers = torch.get_num_threads()
            split, fingerprint = load_split(
                data, config.split, options.memory, num_workers, raw=raw
            )
            current = {config.split: fingerprint}
            if config.split == "all" or data != as_trained:
                current = load_fingerprints(as_trained, raw, num_workers)
            if config.split != "all":
                current = {config.split: current[config.split]}
            changed = bool(changed_splits(metadata["fingerprints"], current))
    check_same_data(
        accelerator, {config.split: fingerprint}, partial(list_samples, data, config.split)
    )
    with raise_on_all_ranks(accelerator):
        split = weights.align_classes(path, metadata, split)
        transform = BatchTransform(metadata["mean"], metadata["std"], (), accelerator.device)
        size = config.batch_size or eval_batch_size(
            accelerator.device, metadata["model"]["image_size"]
        )
        loader = build_loader(split, transform, options, batch_size=size, seed=None)
        is_main_process = accelerator.is_main_process
        outputs = {  # without test-time augmentation first
            tta: run_dir.evaluation_dir(
                path, config.part(metadata["data"]), config.output, is_main_process, tta
            )
            for tta in dict.fromkeys(("none", config.tta))
        }
    if changed:
        console.warn(
            f"{'the data' if config.split == 'all' else f'the {config.split} split'} has changed "
            "since the training (files added, removed, renamed or replaced), or is another "
            "dataset: it may contain training samples"
        )
    if missing := split.missing_classes():
        console.warn(
            f"the data has no samples of {len(missing)} of the {len(split.class_names)} classes "
            f"({name_some(missing)}): macro-F1 leaves out those that are also never predicted"
        )
    title = dataset_title(data.dataset)
    console.settings(
        f"{model_name} of {path}",
        {
            "data": f"{config.split} of {title}: {len(split.labels):,} samples",
            "device": console.device_summary(describe(accelerator)),
        },
    )
    model = to_device(model, model_name, accelerator.device)
    temperature = metadata["temperature"]
    if config.calibrate:
        with closing(loader):
            uncalibrated = predict_all(accelerator, model, loader)
        with raise_on_all_ranks(accelerator):
            temperature = fit_temperature(uncalibrated.logits, uncalibrated.labels)
            if is_main_process:
                weights.write_temperature(path, temperature)
        before = uncalibrated.report()
        console.info(
            f"temperature {temperature:.4f}, written to {path}; without it: loss "
            f"{before['loss']:.4f}, calibration error {before['calibration_error']:.4f}"
        )
    for tta, output in outputs.items():
        with closing(loader):
            predictions = predict_all(accelerator, model, loader, tta, temperature)
        report = {
            "split": config.split,
            **predictions.report(),
            "best_epoch": metadata["best_epoch"],
            "selection_split": metadata["selection_split"],
        }
        title = f"{model_name} on {dataset_title(data.dataset)}"
        if temperature != 1:
            report["temperature"] = temperature
        if tta != "none":
            report["tta"] = tta
            title += f", averaged over each image and its mirror image (--tta {tta})"
        with raise_on_all_ranks(
            accelerator
        ):  # the report last: if it exists, so do the predictions
            output.write_predictions(predictions.csv(split.files()), predictions.safetensors())
            output.write_report(report)
        if tta == "none":
            console.class_table(report)
            console.confusion_matrix(report)
        console.report(
            report,
            title=title,
            files={"weights": str(path), "report": str(output.path)},
            note=selection_bias_note(
                config.split, None if changed else metadata["selection_split"]
            ),
        )
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_script(main))
