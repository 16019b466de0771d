"""Evaluate saved weights on a split: exact metrics, metrics per class, confusion matrix.

  python evaluate.py runs/lenet5-mnist                   test split of the training dataset
  python evaluate.py best.safetensors --split val        another split, with only the weights file
  python evaluate.py best.safetensors --dataset IMAGES --split all
  python evaluate.py runs/alexnet-cifar10 --tta flip     without and with test-time augmentation
  python evaluate.py runs/lenet5-mnist --calibrate       fit a temperature on the validation split
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml evaluate.py runs/lenet5-mnist

The script writes report.json, predictions.csv and predictions.safetensors, which contains the
probabilities. The results do not depend on the number of processes.

--calibrate stores a temperature (Guo et al. 2017) in the metadata of the weights. This script,
predict.py and export.py then divide the logits by it, so that the confidence is close to the
accuracy. Predictions do not change.
"""

import sys
from contextlib import closing
from dataclasses import replace

from lab import console
from lab.config.cli import parse_arguments
from lab.config.schema import EvalConfig, dataset_title
from lab.errors import UserError, name_some, run_script


def main(argv: list[str] | None = None) -> None:
    """Evaluate weights with the arguments `argv`. Raises `UserError`."""
    config = EvalConfig(
        **parse_arguments(EvalConfig, argv, prog="evaluate.py", description=__doc__)
    )

    # Importing PyTorch takes seconds: --help and command-line mistakes are answered before.
    import torch

    from lab.checkpoint import run_dir, weights
    from lab.data import DataConfig, check_dataset, load_split, read_dataset
    from lab.data.loaders import LoaderOptions, build_loader, eval_batch_size
    from lab.data.transforms import BatchTransform
    from lab.distributed import build_accelerator, check_same_data, describe, raise_on_all_ranks
    from lab.engine.evaluation import predict_all
    from lab.engine.metrics import selection_bias_note
    from lab.engine.training import to_device

    # Weights
    path = weights.find_weights(config.weights)
    metadata = weights.read_metadata(path, config.model)
    model_name, selection_split = metadata["model"]["name"], metadata["selection_split"]
    if config.calibrate and selection_split == "test":
        raise UserError(
            f"--calibrate needs a validation split, and {path} was trained without one",
            "Train with --val-fraction 0.1",
        )
    data = DataConfig(**metadata["data"] | config.data_overrides())
    check_dataset(data.dataset, config.data_dir)

    # Distributed setup
    accelerator = build_accelerator(
        training=False,
        mixed_precision=config.mixed_precision,
        trained_precision=metadata["precision"],
        threads=config.threads,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    options = LoaderOptions.create(accelerator, config.loader, config.workers)

    # Model and data
    with raise_on_all_ranks(accelerator), console.status(f"reading {data.dataset}"):
        model = to_device(weights.load_model(path, metadata), model_name, accelerator.device)
        # Download only to a directory that the user names, never to one in the metadata.
        raw = read_dataset(data, download=config.data_dir is not None)
        num_threads = torch.get_num_threads()
        split, fingerprint = load_split(data, config.split, options.memory, num_threads, raw=raw)
        changed = has_changed(metadata, data, config.split, raw, fingerprint)
    check_same_data(accelerator, {config.split: fingerprint})
    with raise_on_all_ranks(accelerator):
        split = weights.align_classes(path, metadata, split)
        part = config.part(metadata["data"])
        outputs = {  # without test-time augmentation first
            tta: run_dir.evaluation_dir(path, part, config.output, accelerator.is_main_process, tta)
            for tta in dict.fromkeys(("none", config.tta))
        }
    transform = BatchTransform(metadata["mean"], metadata["std"], (), accelerator.device)
    size = config.batch_size or eval_batch_size(accelerator.device, metadata["model"]["image_size"])
    loader = build_loader(split, transform, options, batch_size=size, seed=None)
    warn_of_other_data(split, config.split, changed)
    rows = {
        "data": f"{config.split} of {dataset_title(data.dataset)}: {len(split.labels):,} samples",
        "device": console.device_summary(describe(accelerator)),
    }
    console.settings(f"{model_name} of {path}", rows)

    # Evaluation
    temperature = metadata["temperature"]
    if config.calibrate:
        temperature = calibrate(accelerator, model, loader)
    for tta, output in outputs.items():
        with closing(loader):
            predictions = predict_all(accelerator, model, loader, tta, temperature)
        title = f"{model_name} on {dataset_title(data.dataset)}"
        report = {"split": config.split, **predictions.report()}
        report |= {"best_epoch": metadata["best_epoch"], "selection_split": selection_split}
        if temperature != 1:
            report["temperature"] = temperature
        if tta != "none":
            report["tta"] = tta
            title += f", averaged over each image and its mirror image (--tta {tta})"
        with raise_on_all_ranks(accelerator):
            if config.calibrate and tta == "none" and accelerator.is_main_process:
                weights.write_temperature(path, temperature)
            output.write_predictions(predictions.csv(split.files()), predictions.safetensors())
            output.write_report(report)  # last: if it exists, so do the predictions
        if tta == "none":
            console.class_table(report)
            console.confusion_matrix(report)
        console.report(
            report,
            title=title,
            files={"weights": str(path), "report": str(output.path)},
            note=selection_bias_note(config.split, None if changed else selection_split),
        )
    accelerator.end_training()


def calibrate(accelerator, model, loader):
    """Return the temperature fitted on the loader's split, and print the metrics without it.

    All processes have all logits, so all fit the same temperature.
    """
    from lab.engine.calibration import fit_temperature
    from lab.engine.evaluation import predict_all

    with closing(loader):
        uncalibrated = predict_all(accelerator, model, loader)
    temperature = fit_temperature(uncalibrated.logits, uncalibrated.labels)
    before = uncalibrated.report()
    console.info(
        f"temperature {temperature:.4f}; without it: loss {before['loss']:.4f}, "
        f"calibration error {before['calibration_error']:.4f}"
    )
    return temperature


def has_changed(metadata, data, split_name, raw, fingerprint):
    """Return whether the evaluated split differs from the one in training.

    `data` is the `DataConfig` of the evaluation, `raw` the dataset that was read for it, and
    `fingerprint` the fingerprint of the evaluated split.
    """
    import torch

    from lab.data import load_fingerprints
    from lab.data.fingerprint import changed_splits

    limits = {name: metadata["data"][name] for name in ("max_train_samples", "max_eval_samples")}
    as_trained = replace(data, **limits)  # with the number of samples in training
    current = {split_name: fingerprint}
    if split_name == "all" or data != as_trained:
        current = load_fingerprints(as_trained, raw, torch.get_num_threads())
    if split_name != "all":
        current = {split_name: current[split_name]}
    return bool(changed_splits(metadata["fingerprints"], current))


def warn_of_other_data(split, split_name, changed):
    """Warn if the data has changed since the training, or lacks samples of some classes."""
    if changed:
        console.warn(
            f"{'the data' if split_name == 'all' else f'the {split_name} split'} has changed "
            "since the training (files added, removed, renamed or replaced), or is another "
            "dataset: it may contain training samples"
        )
    if missing := split.missing_classes():
        console.warn(
            f"the data has no samples of {len(missing)} of the {len(split.class_names)} classes "
            f"({name_some(missing)}): macro-F1 leaves out those that are also never predicted"
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
