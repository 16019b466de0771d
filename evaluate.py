"""Evaluate saved weights on a split: exact metrics, metrics per class, confusion matrix.

  python evaluate.py runs/lenet5-mnist                   test split of the training dataset
  python evaluate.py best.safetensors --split val        another split, with only the weights file
  python evaluate.py best.safetensors --dataset IMAGES --split all
  python evaluate.py runs/alexnet-cifar10 --tta flip     without and with test-time augmentation
  python evaluate.py runs/lenet5-mnist --calibrate       fit a temperature on the validation split
  python evaluate.py runs/one runs/two runs/three        an ensemble: the mean of the probabilities
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml evaluate.py runs/lenet5-mnist

The script writes report.json, predictions.csv and predictions.safetensors, which contains the
probabilities. The results do not depend on the number of processes.

--calibrate stores a temperature (Guo et al. 2017) in the metadata of the weights. This script,
predict.py and export.py then divide the logits by it, so that the confidence is close to the
accuracy. Predictions do not change.
"""

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    from lab.checkpoint import weights
    from lab.data import DataConfig, check_dataset, is_named
    from lab.data.loaders import LoaderOptions
    from lab.distributed import build_accelerator, check_same_data, describe, raise_on_all_ranks
    from lab.engine.evaluation import Predictions
    from lab.engine.metrics import selection_bias_note

    # Weights
    members = []
    for path in map(weights.find_weights, config.weights):
        metadata = weights.read_metadata(path, config.model)
        given = config.data_overrides(metadata["data"])
        data = DataConfig(**metadata["data"] | given)
        check_dataset(data.dataset, given)
        members.append(Member(path, metadata, data, is_named(data.dataset, given)))
    check_weights(members, config)
    first, paths = members[0], [str(member.path) for member in members]

    # Distributed setup
    accelerator = build_accelerator(
        training=False,
        mixed_precision=config.mixed_precision,
        trained_precision=first.metadata["precision"],
        threads=config.threads,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    options = LoaderOptions.create(accelerator, config.loader, config.workers)

    # Models and data
    with raise_on_all_ranks(accelerator), console.status(f"reading {first.data.dataset}"):
        fingerprint = load_members(members, config, options)
    checksums = {f"weights {i}": m.metadata.get("sha256", "") for i, m in enumerate(members)}
    check_same_data(accelerator, {config.split: fingerprint} | checksums)
    with raise_on_all_ranks(accelerator):
        for member in members:
            member.split = weights.align_classes(member.path, member.metadata, member.split)
        outputs = output_dirs(members, config, accelerator.is_main_process)
    warn_of_other_data(first.split, config.split, any(member.changed for member in members))
    dataset, num_samples = dataset_title(first.data.dataset), len(first.split.labels)
    model_names = " + ".join(member.model_name for member in members)
    rows = {
        "data": f"{config.split} of {dataset}: {num_samples:,} samples",
        "device": console.device_summary(describe(accelerator)),
    }
    console.settings(f"{model_names} of {name_some(paths)}", rows)

    # Evaluation
    if config.calibrate:
        first.metadata["temperature"] = calibrate(accelerator, first, config, options)
    for tta, output in outputs.items():
        predictions = Predictions.mean(
            [predict_split(accelerator, member, config, options, tta) for member in members]
        )
        report = {"split": config.split, **predictions.report()} | origin(members)
        title = f"{model_names} on {dataset}"
        if tta != "none":
            report["tta"] = tta
            title += f", averaged over each image and its mirror image (--tta {tta})"
        with raise_on_all_ranks(accelerator):
            if config.calibrate and tta == "none" and accelerator.is_main_process:
                weights.write_temperature(first.path, first.metadata)
            output.write_predictions(
                predictions.csv(first.split.files()), predictions.safetensors()
            )
            output.write_report(report)  # last, so that a new report has its predictions
        if tta == "none":
            console.class_table(report)
            console.confusion_matrix(report)
        notes = [
            selection_bias_note(config.split, None if m.changed else m.metadata["selection_split"])
            for m in members
        ]
        console.report(
            report,
            title=title,
            files={"weights": ", ".join(paths), "report": str(output.path)},
            note=next(filter(None, notes), ""),
        )


def output_dirs(members, config, is_main_process):
    """Return the directories of the results by the kind of test-time augmentation, "none" first."""
    from lab.checkpoint.run_dir import evaluation_dir

    first = members[0]
    part = config.part(first.metadata["data"])
    target = config.output or (f"ensemble-{part}" if len(members) > 1 else "")
    is_test_of_run = part == "test" and len(members) == 1 and not first.changed
    return {
        tta: evaluation_dir(first.path, part, target, is_main_process, tta, is_test_of_run)
        for tta in dict.fromkeys(("none", config.tta))
    }


@dataclass
class Member:
    """One of the models whose probabilities are averaged; usually there is only one."""

    path: Path  # of the weights
    metadata: dict[str, Any]  # of the weights
    data: Any  # the `DataConfig` of the evaluation
    is_named: bool  # whether the user named the dataset's code or directory
    model: Any = None
    split: Any = None  # the evaluated split, with the member's image size
    changed: bool = False  # whether the split differs from the one in training

    @property
    def model_name(self) -> str:
        """Return the name of the architecture."""
        return self.metadata["model"]["name"]


def check_weights(members, config):
    """Raise `UserError` if weights cannot be evaluated together, or not with `config`."""
    first, *others = members
    for member in others:
        if member.metadata["class_names"] != first.metadata["class_names"]:
            raise UserError(
                f"{first.path} and {member.path} were trained on different classes",
                "Give runs with the same classes in the same order",
            )
        precisions = [m.metadata["precision"] for m in (first, member)]
        if config.mixed_precision == "auto" and precisions[0] != precisions[1]:
            raise UserError(
                f"{first.path} and {member.path} were trained in the precisions "
                f"{' and '.join(precisions)}",
                "Choose one with --mixed-precision",
            )
    if config.calibrate and first.metadata["selection_split"] == "test":
        raise UserError(
            f"--calibrate needs a validation split, and {first.path} was trained without one",
            "Train with --val-fraction 0.1",
        )


def load_members(members, config, options):
    """Load the models and their splits, and return the fingerprint of the split.

    Raises `UserError` if the splits of several models do not have the same samples.
    """
    import torch

    from lab.checkpoint import weights
    from lab.data.splits import load_split, read_dataset
    from lab.engine.evaluation import MAX_LOGITS_BYTES
    from lab.engine.training import to_device

    first, num_threads, loaded = members[0], torch.get_num_threads(), {}
    for member in members:
        model, data = weights.load_model(member.path, member.metadata), member.data
        member.model = to_device(model, member.model_name, options.device)
        if data not in loaded:
            # Download and import only what the user names, never what the metadata name.
            raw = read_dataset(data, download=member.is_named)
            loaded[data] = (
                raw,
                *load_split(data, config.split, options.memory, num_threads, raw=raw),
            )
        raw, member.split, fingerprint = loaded[data]
        member.changed = has_changed(member.metadata, data, config.split, raw, fingerprint)
        if fingerprint != loaded[first.data][2]:
            raise UserError(
                f"the {config.split} splits of {first.path} and {member.path} have different "
                "samples",
                "Give runs with the same data and --split-seed, or a --dataset with --split all",
            )
    num_logits = len(first.split.labels) * len(first.metadata["class_names"])
    if len(members) > 1 and 4 * num_logits > MAX_LOGITS_BYTES:
        raise UserError(
            "the mean needs the probabilities of all samples, and they take more than 200 MB",
            "Evaluate fewer samples with --max-eval-samples",
        )
    return fingerprint


def predict_split(accelerator, member, config, options, tta="none"):
    """Return the predictions of a member for its split."""
    from lab.data.loaders import build_loader, eval_batch_size
    from lab.data.transforms import BatchTransform
    from lab.engine.evaluation import predict_all

    metadata, device = member.metadata, accelerator.device
    transform = BatchTransform(metadata["mean"], metadata["std"], (), device)
    size = config.batch_size or eval_batch_size(device, metadata["model"]["image_size"])
    loader = build_loader(member.split, transform, options, batch_size=size, seed=None)
    with closing(loader):
        return predict_all(accelerator, member.model, loader, tta, metadata["temperature"])


def calibrate(accelerator, member, config, options):
    """Return the temperature fitted on the member's split, and print the metrics without it.

    All processes have all logits, so all fit the same temperature.
    """
    from lab.engine.calibration import fit_temperature

    member.metadata["temperature"] = 1.0
    uncalibrated = predict_split(accelerator, member, config, options)
    temperature = fit_temperature(uncalibrated.logits, uncalibrated.labels)
    before = uncalibrated.report()
    console.info(
        f"temperature {temperature:.4f}; without it: loss {before['loss']:.4f}, "
        f"calibration error {before['calibration_error']:.4f}. The run's report.json and "
        "report.html do not include it: `evaluate.py RUN --output RUN`, then `compare.py RUN`, "
        "update them"
    )
    return temperature


def origin(members):
    """Return the entries of a report that say which weights were evaluated."""
    first, *others = (member.metadata for member in members)
    splits = {member.metadata["selection_split"] for member in members}
    entries = {"selection_split": "test" if "test" in splits else "validation"}
    if others:
        return {"weights": [str(member.path) for member in members]} | entries
    if first["temperature"] != 1:
        entries["temperature"] = first["temperature"]
    return {"best_epoch": first["best_epoch"]} | entries


def has_changed(metadata, data, split_name, raw, fingerprint):
    """Return whether the evaluated split differs from the one in training.

    `data` is the `DataConfig` of the evaluation, `raw` the dataset that was read for it, and
    `fingerprint` the fingerprint of the evaluated split.
    """
    import torch

    from lab.data.fingerprint import changed_splits
    from lab.data.splits import load_fingerprints

    limits = {name: metadata["data"][name] for name in ("max_train_samples", "max_eval_samples")}
    as_trained = replace(data, **limits)  # with the number of samples in training
    current = {split_name: fingerprint}
    if split_name == "all" or data != as_trained:
        try:
            current = load_fingerprints(as_trained, raw, torch.get_num_threads())
        except UserError:  # this dataset cannot be divided like that of the training
            return True
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
