"""Writes a run's model card, README.md in Hugging Face's format, from the run's files alone.

The licence is left to whoever publishes the weights: it is theirs to choose, and data have terms.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import BEST, CARD, PLOTS, RunDir
from lab.config.recipes import resolve
from lab.config.schema import TrainConfig, flag
from lab.errors import UserError
from lab.report.markdown import code, escaped, table
from lab.report.run_reader import RunResult, read_run

# Names on the Hub of the data sets that lie there.
ON_THE_HUB = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
# What of the settings a reader wants to know, and what of them a command has to name.
SHOWN = ("recipe", "epochs", "max_steps", "batch_size", "optimizer", "lr", "schedule",
         "weight_decay", "dropout", "label_smoothing", "max_grad_norm", "ema_decay", "augment", "init",
         "freeze", "monitor", "seed")  # fmt: skip
ELSEWHERE = ("model", "dataset", "recipe", "data_dir", "init_checkpoint", "workers", "threads", "loader",
             "timeout_seconds", "max_hours", "resume", "checkpoint_every", "keep_checkpoints",
             "final_checkpoints", "output_dir", "name", "overwrite", "log_every", "tracker",
             "push_to_hub", "hub_images", "hub_public", "quiet", "debug")  # fmt: skip
CONFUSION = f"{PLOTS}/confusion_matrix.png"
USE = """\
python evaluate.py best.safetensors              # these numbers again
python predict.py best.safetensors PICTURES      # the likeliest classes of pictures"""


def write(run: RunDir) -> None:
    """Writes the card of a finished run; raises `UserError` where its files do not tell of one."""
    if run.is_main_process:
        text = card(run.path)
        write_atomically(run.path / CARD, lambda path: path.write_text(text, encoding="utf-8"))


def card(path: Path) -> str:
    """The card of the run in a folder: metadata in YAML, then Markdown."""
    run = read_run(path)
    if not (path / BEST).is_file():
        raise UserError(f"the run {path} has no {BEST}", "Copy it back, or train it again")
    # What has no character of its own, in a folder's name, has no place in a text either.
    title = path.resolve().name.encode(errors="replace").decode()
    config = run.settings()
    return f"---\n{_metadata(title, config, run.report)}\n---\n\n{_body(title, config, run)}"


def _metadata(title: str, config: TrainConfig, report: Mapping[str, Any]) -> str:
    """The card's metadata in YAML, the test numbers with all their digits."""
    from huggingface_hub import EvalResult, ModelCardData

    on_the_hub = ON_THE_HUB.get(config.dataset)
    measured: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_type": on_the_hub or config.dataset,
        "dataset_name": config.dataset,
        "dataset_split": "test",
    }
    accuracy, macro_f1 = float(report["accuracy"]), float(report["macro_f1"])
    data = ModelCardData(
        library_name="lab",
        pipeline_tag="image-classification",
        tags=["image-classification", "pytorch", config.model],
        datasets=[on_the_hub] if on_the_hub else None,
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
    settings, report, drawn = run.config, run.report, (run.path / CONFUSION).is_file()
    model, dataset = escaped(config.model), escaped(config.dataset)
    names, matrix = report["class_names"], report["confusion_matrix"]
    num_samples = int(report["num_samples"])
    right = sum(row[k] for k, row in enumerate(matrix))
    numbers = [
        "-" if report[key] is None else f"{report[key]:.4f}"
        for key in ("accuracy", "macro_f1", "loss")
    ]
    classes = (
        (
            escaped(row["class"]),
            *(f"{float(row[key]):.4f}" for key in ("precision", "recall", "f1")),
            f"{int(row['support']):,}",
        )
        for row in report["per_class"]
    )
    seconds = sum(row["train_seconds"] + row["eval_seconds"] for row in run.history)
    place = f"{settings['world_size']} x {settings['device']}, {settings['precision']}"
    shown = {name: getattr(config, name) for name in SHOWN if getattr(config, name) != ""}
    shown |= {"versions": ", ".join(f"{k} {v}" for k, v in settings["versions"].items())}
    shown |= {"commit of lab": settings["commit"]} if settings.get("commit") else {}
    parts = [
        f"# {escaped(title)}",
        f"{model} trained on {dataset} with lab: it tells {len(names)} classes of pictures apart. "
        f"Pictures are taken at {config.image_size} x {config.image_size} pixels"
        + (f"; {settings['parameters']:,} parameters." if "parameters" in settings else "."),
        "## Results",
        ("A part of the test" if config.max_eval_samples else "The test")
        + f" split, {num_samples:,} samples, each counted exactly once: {right:,} are classified "
        "correctly.",
        table(("split", "accuracy", "macro-F1", "loss"), [("test", *numbers)]),
        _selection(config, report, len(run.history)),
        table(("class", "precision", "recall", "F1", "samples"), classes),
        f"![Confusion matrix of the test split]({CONFUSION})" if drawn else "",
        "## Training",
        _origin(config),
        code(command(config), "sh"),
        f"It took {seconds:,.0f} seconds on {escaped(place)}. Other devices and versions give "
        "other last digits.",
        table(("setting", "value"), ((escaped(k), escaped(v)) for k, v in shown.items())),
        "## Use",
        f"{BEST} alone is enough: it says which network, classes and preprocessing it takes.",
        code(USE, "sh"),
        code(
            'from lab import load_model\n\nmodel, info = load_model("best.safetensors")', "python"
        ),
        "## Intended use and limits",
        _limits(config, len(names)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _selection(config: TrainConfig, report: Mapping[str, Any], num_epochs: int) -> str:
    """What the best epoch was chosen on, and what follows for the numbers."""
    chosen = (
        f"Epoch {int(report['best_epoch'])} of {num_epochs} was chosen, by its "
        f"{config.monitor.replace('_', '-')} on "
    )
    if report["selection_split"] == "test":
        return (
            f"**{chosen}this same test split (the protocol of the recipe "
            f"{escaped(config.recipe)}): these numbers are optimistic.**"
        )
    return f"{chosen}the validation split; the test split was read once, at the end."


def _origin(config: TrainConfig) -> str:
    """What the weights began as, and how to read the command."""
    begun = "The weights began at random."
    if config.pretrained:
        begun = "The weights began as torchvision's, trained on ImageNet, but for the head."
    elif config.init_checkpoint:
        begun = "The weights began as those of another run (WEIGHTS below)."
    if config.freeze != "none":
        begun += " Only the head was trained."
    folder = " PICTURES is the folder of pictures." if config.dataset == "folder" else ""
    return f"{begun} To do it again:{folder}"


def command(config: TrainConfig) -> str:
    """The command that trains so again: what differs from the recipe's settings.

    Folders of this machine are left out of it.
    """
    base = {name: getattr(config, name) for name in ("model", "dataset", "recipe", "epochs")}
    words = ["python", "train.py"]
    for name, value in base.items():
        words += [flag(name), str(value)]
    words += ["--data-dir", "PICTURES"] if config.dataset == "folder" else []
    words += ["--init-checkpoint", "WEIGHTS"] if config.init_checkpoint else []
    recipe = asdict(resolve(base))
    for name, value in asdict(config).items():
        if name in ELSEWHERE or value == recipe[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), str(value)]
    return shlex.join(words)


def _limits(config: TrainConfig, num_classes: int) -> str:
    data = "this folder of pictures" if config.dataset == "folder" else escaped(config.dataset)
    return "\n".join(
        [
            f"- For pictures like those of {data}. On any other kind nothing was measured.",
            f"- It gives one of its {num_classes} classes for every picture, also for one that "
            "shows none of them. Whether its softmax is a probability was not measured.",
            f"- One training, seed {config.seed}: another seed gives other numbers.",
            "- Whether it does worse for some people, places or cameras than for others was not "
            "examined. No decision about people should rest on it.",
            "- No licence is given here: whoever publishes the weights has to choose one, and to "
            "see to the terms of the data.",
        ]
    )
