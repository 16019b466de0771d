"""Write the HTML page of a run or a data check; it loads no other file or URL."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import console
from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import PAGE, PLOTS
from lab.config.recipes import resolve
from lab.config.schema import AUTOMATIC, OUTPUT, TrainConfig
from lab.data import TITLES
from lab.errors import UserError
from lab.models import with_input_defaults
from lab.report import plots
from lab.report.run_reader import RunResult, read_run

if TYPE_CHECKING:
    import numpy as np

    from lab.data.checks import DataCheck

MAX_MATRIX_CLASSES = 120  # with more classes, the page has no confusion matrix
NUM_TOP = 3  # classes whose probabilities are listed beside a mistake
NUM_CONFUSIONS = 20  # that are listed
MAX_IMAGE_BYTES = 1_900_000  # of the text that embeds mistakes; a page stays below 3 MB
MAX_LISTED = 1000  # problems on the page of a data check
MAX_PNG_SIDE = 32  # pixels; larger images are embedded as JPEG, at a quarter of the size
ENVIRONMENT = {"device": "device", "device_name": "device name", "world_size": "processes",
               "precision": "precision", "threads": "CPU threads", "parameters": "parameters",
               "macs": "MACs per image", "commit": "commit of lab"}  # fmt: skip


def write(path: Path) -> Path:
    """Write the page of the run in a directory and return its path.

    Raises `UserError` if the run is damaged or the page cannot be written.
    """
    run = read_run(path)
    write_page(path / PAGE, "report.html", _run_context(run))
    return path / PAGE


def write_check(path: Path, directory: str, found: DataCheck) -> None:
    """Write the page of a data check, with samples of each class."""
    counts = zip(*found.counts.values(), strict=True)
    context = {
        "directory": directory,
        "found": found,
        "classes": [*zip(found.class_names, counts, strict=True)],
        "split_names": [TITLES[name] for name in found.counts],
        "samples": [
            (name, [(file, _thumbnail(image.numpy())) for file, image in samples])
            for name, samples in zip(found.class_names, found.samples, strict=True)
        ],
        "max_listed": MAX_LISTED,
    }
    write_page(path, "check.html", context)


def write_page(path: Path, template: str, context: dict[str, Any]) -> None:
    """Write the page that a template gives with these variables."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Class names and paths may come from strangers: all values are escaped.
    environment = Environment(
        loader=PackageLoader("lab"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template(template).render(context)
    # Directory names need not be UTF-8.
    write_atomically(path, text.encode("utf-8", "replace"))


def _run_context(run: RunResult) -> dict[str, Any]:
    """Return the variables of the template report.html."""
    from lab.engine.metrics import selection_bias_note
    from lab.report.mistakes import NUM_MOST_CONFIDENT

    config, report = run.config, run.report
    names = [name or "(no name)" for name in report["class_names"]]
    matrix = report["confusion_matrix"]
    mistakes = _mistakes(run)
    return {
        "title": f"{run.model} on {run.dataset}",
        "path": str(run.path),
        "report": report,
        "warnings": report.get("warnings", []),
        "bias_note": selection_bias_note("test", report["selection_split"]),
        "history": run.history,
        "time": console.duration(run.seconds),
        "curves": data_uri(plots.png(lambda: plots.curves(run)), "png"),
        "calibration": (
            data_uri(plots.png(lambda: plots.calibration(run)), "png")
            if run.predictions is not None
            else None
        ),
        "plots": [f"{PLOTS}/{p.name}" for p in sorted((run.path / PLOTS).glob("*.png"))],
        "settings": settings(config),
        "recipe": config["recipe"],
        "environment": [(ENVIRONMENT[k], config[k]) for k in ENVIRONMENT if config.get(k)],
        "versions": config["versions"],
        "names": names,
        "short_names": [plots.short(name, plots.MAX_LONG_NAME_LENGTH) for name in names],
        "matrix": matrix if len(names) <= MAX_MATRIX_CLASSES else None,
        "confusions": run.confusions(NUM_CONFUSIONS),
        "num_mistakes": report["num_samples"] - sum(row[i] for i, row in enumerate(matrix)),
        "num_images": len(mistakes),
        "num_shown": min(NUM_MOST_CONFIDENT, len(mistakes)),
        "explained": any(row[-1] for row in mistakes),
        "data": {
            "names": names,
            "totals": [sum(row) for row in matrix],
            "mistakes": mistakes,
        },
    }


def settings(config: dict[str, Any]) -> list[tuple[str, Any, Any, bool]]:
    """Return (name, value, the recipe's value, whether they differ) of each setting of a run.

    The settings of its output are left out. The recipe's value is None if recipes do not set it.
    """
    try:
        names = ("model", "dataset", "recipe")
        defaults = with_input_defaults(resolve({name: config[name] for name in names}))
        recipe = dataclasses.asdict(defaults)
    except UserError:  # a model, dataset or recipe that this version does not have
        recipe = {}
    rows = []
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] != OUTPUT and field.name in config:
            value = config[field.name]
            in_recipe = field.metadata.get("from_recipe", False)
            default = recipe.get(field.name, value) if in_recipe else None
            automatic = field.name in AUTOMATIC and default == AUTOMATIC[field.name]
            differs = in_recipe and value != default and not automatic
            rows.append((field.name, value, default, differs))
    return rows


def _mistakes(run: RunResult) -> list[tuple[int, int, str, float, str, list, str]]:
    """Return the saved mistakes for the page.

    Each is (true class, predicted class, name, confidence, data URI, the NUM_TOP most probable
    classes with their probabilities, data URI of the image with its heat map or ""). Only as many
    as MAX_IMAGE_BYTES allows, in the order of `lab.report.mistakes.select_mistakes`.
    """
    images = run.images()
    if images is None or run.predictions is None or run.confidence is None:
        return []
    from lab.report.explain import overlay

    mistakes, num_bytes, probabilities = [], 0, run.probabilities()
    columns = (images[name] for name in ("mistakes_labels", "mistakes_index", "mistakes"))
    for number, (label, index, image) in enumerate(zip(*columns, strict=True)):
        uri, explained, top = _thumbnail(image), "", []
        if number < len(images["heatmaps"]):
            explained = _thumbnail(overlay(image, images["heatmaps"][number]))
        if probabilities is not None:
            row = probabilities[index]
            top = [(int(k), round(float(row[k]), 4)) for k in (-row).argsort()[:NUM_TOP]]
        name = run.files[index] if run.files else f"#{index}"
        num_bytes += len(uri) + len(name) + len(explained)
        if num_bytes > MAX_IMAGE_BYTES:
            break
        prediction, confidence = int(run.predictions[index]), float(run.confidence[index])
        mistakes.append((int(label), prediction, name, round(confidence, 4), uri, top, explained))
    return mistakes


def _thumbnail(image: np.ndarray) -> str:
    """Return the data URI of an image, uint8 [C, H, W]."""
    from PIL import Image

    file = io.BytesIO()
    thumbnail = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    if max(thumbnail.size) <= MAX_PNG_SIDE:
        thumbnail.save(file, "PNG")
        return data_uri(file.getvalue(), "png")
    thumbnail.save(file, "JPEG", quality=90)
    return data_uri(file.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """Return the URI of an image that is embedded in the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
