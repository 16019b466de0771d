"""Write the model card of a run, README.md in Hugging Face's format, from the run's files.

The card gives no license: whoever publishes the weights has to choose one that the terms of the
dataset allow.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import BEST, CARD, CONFIG, PLOTS, RunDir
from lab.config.schema import HUB, TIMM, TrainConfig, is_code, is_own_dataset
from lab.errors import UserError
from lab.own_code import OBJECT
from lab.report.markdown import code, escaped, table
from lab.report.run_reader import RunResult, read_run

# Names of datasets on the Hub.
HUB_DATASETS = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
LISTED_SETTINGS = ("recipe", "epochs", "max_steps", "batch_size", "optimizer", "lr", "schedule",
                   "weight_decay", "dropout", "label_smoothing", "max_grad_norm", "ema_decay",
                   "augment", "init", "freeze", "monitor", "seed")  # fmt: skip
CONFUSION_PLOT = f"{PLOTS}/confusion_matrix.png"
OWN_CODE = "FILE.py:FUNCTION"  # stands for a model or a dataset of the user's


def write(run: RunDir) -> None:
    """Write the card of a finished run on the main process.

    Raises `UserError` if the run is unfinished or damaged, or the card cannot be written.
    """
    if run.is_main_process:
        write_atomically(run.path / CARD, card(run.path))


def card(path: Path) -> str:
    """Return the card of the run in a directory: metadata in YAML, then Markdown."""
    run = read_run(path)
    if not (path / BEST).is_file():
        raise UserError(
            f"the run {path} has no {BEST}", "Restore it from a backup, or train it again"
        )
    # A directory name need not be UTF-8; the card is.
    title = path.resolve().name.encode(errors="replace").decode()
    config = run.settings()
    return f"---\n{_metadata(title, config, run.report)}\n---\n\n{_body(title, config, run)}"


def _metadata(title: str, config: TrainConfig, report: Mapping[str, Any]) -> str:
    """Return the metadata of the card in YAML, with the unrounded test metrics."""
    from huggingface_hub import EvalResult, ModelCardData

    hub_dataset = HUB_DATASETS.get(config.dataset)
    if _is_on_hub(config):
        hub_dataset = config.dataset.removeprefix(HUB).partition(":")[0]
    measured: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_type": hub_dataset or config.dataset_title,
        "dataset_name": config.dataset_title,
        "dataset_split": "test",
    }
    accuracy, macro_f1 = float(report["accuracy"]), float(report["macro_f1"])
    data = ModelCardData(
        library_name="lab",
        pipeline_tag="image-classification",
        tags=["image-classification", "pytorch", config.model_title],
        datasets=[hub_dataset] if hub_dataset else None,
        metrics=["accuracy", "f1"],
        model_name=title,
        eval_results=[
            EvalResult(metric_type="accuracy", metric_value=accuracy, **measured),
            EvalResult(
                metric_type="f1",
                metric_name="macro-F1",
                metric_args={"average": "macro"},
                metric_value=macro_f1,
                **measured,
            ),
        ],
    )
    return data.to_yaml()


def _body(title: str, config: TrainConfig, run: RunResult) -> str:
    """Return the card below its metadata in Markdown."""
    settings, report = run.config, run.report
    model, dataset = escaped(config.model_title), escaped(config.dataset_title)
    names, matrix = report["class_names"], report["confusion_matrix"]
    num_samples = int(report["num_samples"])
    num_correct = sum(row[k] for k, row in enumerate(matrix))
    metrics = [
        "-" if report[key] is None else f"{report[key]:.4f}"
        for key in ("accuracy", "macro_f1", "loss")
    ]
    intervals = [
        "{:.4f} to {:.4f}".format(*report[key]) if key in report else "-"
        for key in ("accuracy_interval", "macro_f1_interval")
    ]
    classes = (
        (
            escaped(row["class"]),
            *(f"{float(row[key]):.4f}" for key in ("precision", "recall", "f1")),
            f"{int(row['support']):,}",
        )
        for row in report["per_class"]
    )
    hardware = f"{settings['world_size']} x {settings['device']}, {settings['precision']}"
    listed = {
        name: getattr(config, name) for name in LISTED_SETTINGS if getattr(config, name) != ""
    }
    listed |= {"versions": ", ".join(f"{k} {v}" for k, v in settings["versions"].items())}
    listed |= {"commit of lab": settings["commit"]} if settings.get("commit") else {}
    arguments = f'"{BEST}"' + (", model=MODEL" if is_code(config.model) else "")
    parts = [
        f"# {escaped(title)}",
        f"An image classifier with {len(names)} classes: {model} trained on {dataset} with lab. "
        f"The input size is {config.image_size} x {config.image_size} pixels"
        + (
            f"; the model has {settings['parameters']:,} parameters."
            if "parameters" in settings
            else "."
        ),
        "## Results",
        f"The model classifies {num_correct:,} of the {num_samples:,} samples of "
        + ("a subset of " if config.max_eval_samples == num_samples else "")
        + "the test split correctly. Each sample is counted exactly once.",
        table(
            ("split", "accuracy", "macro-F1", "loss"),
            [("test", *metrics), ("95 % interval", *intervals, "-")],
        ),
        _selection(config, report, len(run.history)),
        table(("class", "precision", "recall", "F1", "samples"), classes),
        f"![Confusion matrix of the test split]({CONFUSION_PLOT})"
        if (run.path / CONFUSION_PLOT).is_file()
        else "",
        "## Training",
        _origin(config),
        "" if _is_passed(config) else code(_command(config), "sh"),
        f"Training took {run.seconds:,.0f} seconds on {escaped(hardware)}. On other hardware or "
        "with other versions, the last digits of the results may differ.",
        table(("setting", "value"), ((escaped(k), escaped(v)) for k, v in listed.items())),
        "## Use",
        f"The metadata of {BEST} hold the architecture, the class names and the preprocessing"
        + (", but not the code of the model." if is_code(config.model) else "."),
        "" if _is_passed(config) else code(_usage(config), "sh"),
        code(f"from lab import load_model\n\nmodel, metadata = load_model({arguments})", "python"),
        "## Intended use and limitations",
        _limits(config, report),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _selection(config: TrainConfig, report: Mapping[str, Any], num_epochs: int) -> str:
    """Return on which split the best epoch was selected, and whether the results are optimistic."""
    epoch = (
        f"Epoch {int(report['best_epoch'])} of {num_epochs} was selected by its "
        f"{config.monitor.replace('macro_f1', 'macro-F1')} on "
    )
    if report["selection_split"] == "test":
        return (
            f"**{epoch}this same test split (the protocol of the recipe notebook), so these "
            "results are optimistic.**"
        )
    return f"{epoch}the validation split. The test split was used once, at the end."


def _origin(config: TrainConfig) -> str:
    """Return how the weights were initialized, and what the placeholders of the command mean."""
    text = "The weights were initialized randomly."
    if config.pretrained:
        library = "timm" if config.model.startswith(TIMM) else "torchvision"
        text = (
            f"The weights were initialized from pretrained weights of {library}, except for the "
            "classifier."
        )
    elif config.init_checkpoint:
        text = "The weights were initialized from those in another file (WEIGHTS below)."
    if config.freeze == "backbone":
        text += " Only the classifier was trained."
    if _is_passed(config):
        return f"{text} The model or the dataset was passed to train.main as a Python object."
    placeholder = _placeholder(config)
    folder = f" ({placeholder} stands for the dataset)" if placeholder else ""
    return f"{text} To train the model again with the settings in {CONFIG}{folder}:"


def _is_passed(config: TrainConfig) -> bool:
    """Return whether the model or the dataset is an object, which no command names."""
    return config.model.startswith(OBJECT) or config.dataset.startswith(OBJECT)


def _is_on_hub(config: TrainConfig) -> bool:
    return config.dataset.startswith(HUB) and config.revision != ""


def _placeholder(config: TrainConfig) -> str:
    """Return what stands for a path of the user's in a command; "" if the data have a name."""
    if is_code(config.dataset):
        return OWN_CODE
    return "IMAGES" if is_own_dataset(config.dataset) and not _is_on_hub(config) else ""


def _command(config: TrainConfig) -> str:
    """Return the command that trains the model again; placeholders replace paths."""
    command = f"python train.py --config {CONFIG}"
    command += f" --model {OWN_CODE}" if is_code(config.model) else ""
    placeholder = _placeholder(config)
    if placeholder:
        command += f" --dataset {placeholder}"
        columns = {"--image-column": config.image_column, "--label-column": config.label_column}
        for option, column in columns.items():
            command += f" {option} {shlex.quote(column)}" if column else ""
    return command + (" --init-checkpoint WEIGHTS" if config.init_checkpoint else "")


def _usage(config: TrainConfig) -> str:
    """Return the commands that use the weights."""
    options = f" --model {OWN_CODE}" if is_code(config.model) else ""
    dataset = f" --dataset {OWN_CODE}" if is_code(config.dataset) else ""
    return (
        f"# Evaluate on the test split again.\npython evaluate.py {BEST}{options}{dataset}\n"
        "# Print the most probable classes of images.\n"
        f"python predict.py {BEST} IMAGES{options}"
    )


def _limits(config: TrainConfig, report: Mapping[str, Any]) -> str:
    error = report.get("calibration_error")
    temperature = report.get("temperature", 1.0)
    if error is None:
        calibration = "The calibration of its confidence was not measured."
    else:
        how = "without a temperature" if temperature == 1 else f"with temperature {temperature:.3f}"
        calibration = f"The expected calibration error of its confidence, {how}, is {error:.4f} on "
        calibration += "the test split."
    data = "the dataset it was trained on" if _placeholder(config) else config.dataset
    return "\n".join(
        [
            f"- The model is for images like those of {data}. It was not evaluated on others.",
            f"- It assigns one of its {len(report['class_names'])} classes to every image, also to "
            f"images of something else. {calibration}",
            f"- These are the results of one run with seed {config.seed}; they vary between seeds.",
            "- Differences in performance between groups of people, places or cameras were not "
            "examined. Do not base decisions about people on this model.",
            "- This card gives no license. Whoever publishes the weights has to choose one that "
            "the terms of the dataset allow.",
        ]
    )
