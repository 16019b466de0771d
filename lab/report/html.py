"""A page for each finished run, and one for several: no network, and no file but itself."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lab import console
from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import PAGE, PLOTS
from lab.config.recipes import resolve
from lab.config.schema import OUTPUT, TrainConfig
from lab.errors import UserError
from lab.report import compare, plots
from lab.report.run_reader import RunResult, read_run

if TYPE_CHECKING:
    import numpy as np


HEAD = 24  # characters of a run's name above a column
NARROW_SCREEN_NAME = 11  # characters of a class name on a narrow screen
IN_FULL = 120  # classes whose confusion matrix the page holds
CONFUSIONS = 20  # that are listed
PICTURE_BYTES = 1_900_000  # of the text that embeds mistakes; a page stays below 3 MB
EXACT_SIDE = 32  # pixels; larger pictures are embedded as JPEG, at a quarter of the size
FACTS = ("device", "device_name", "world_size", "precision", "threads", "parameters",
         "macs", "commit")  # fmt: skip
NAMED = ("model", "data set", "chosen on")  # columns of a comparison that hold no numbers
COUNTS = ("parameters", "multiply-adds")  # and those whose numbers are long


def write(path: Path) -> Path:
    """Writes the page of the run in a folder, and returns its path; raises `UserError`."""
    run = read_run(path)
    _write_page(path / PAGE, "report.html", _about(run))
    return path / PAGE


def write_comparison(
    folder: Path, runs: Sequence[RunResult], rows: Sequence[dict[str, Any]]
) -> None:
    """Writes compare.html, of `comparison.rows`; it links to the pages of the runs."""
    table = []
    for row in rows:
        page = Path(row["run"]) / PAGE
        relative = Path(os.path.relpath(page, folder)).as_posix()
        table.append(
            {
                "run": row["run"],
                "link": quote(os.fsencode(relative)) if page.is_file() else None,
                "cells": [_cell(name, value) for name, value in row.items() if name != "run"],
            }
        )
    groups = compare.by_classes(runs)
    picture = folder / compare.COMPARISON_PLOT
    metadata = {
        "heads": [(name, name in NAMED) for name in rows[0] if name != "run"],
        "table": table,
        "interval": compare.INTERVAL,
        "picture": _embedded(picture.read_bytes(), "png") if picture.is_file() else None,
        "recalls": compare.RECALLS,
        "groups": [(_names(group[0]), list(map(_recalls, group))) for group in groups],
    }
    _write_page(folder / compare.COMPARISON_PAGE, "comparison.html", metadata)


def _cell(name: str, value: Any) -> dict[str, Any]:
    """The text of a cell, what stands small below it, the number to sort by, all its digits."""
    exact = text = compare.text(name, value)
    number = value[0] if isinstance(value, tuple) else value
    if name in COUNTS and value is not None:
        text = compare.brief(value)
    text, _, below = text.partition(" [") if name == "to best" else (text, "", "")
    return {
        "text": text,
        "below": "[" + below if below else "",
        "title": exact if text != exact and not below else "",
        "number": number if isinstance(number, (int, float)) else None,
        "named": name in NAMED,
    }


def _names(run: RunResult) -> list[str]:
    return [name or "(no name)" for name in run.report["class_names"]]


def _recalls(run: RunResult) -> tuple[str, str, list[float]]:
    name = str(run.path)
    return name, plots.short(name, HEAD), [row["recall"] for row in run.report["per_class"]]


def _write_page(path: Path, template: str, metadata: dict[str, Any]) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Class names and paths may be a stranger's: all that is filled in is escaped.
    environment = Environment(
        loader=PackageLoader("lab"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template(template).render(metadata)
    content = text.encode("utf-8", "replace")  # names of folders need not be UTF-8
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _about(run: RunResult) -> dict[str, Any]:
    """What the template of a run's page is filled with."""
    from lab.engine.metrics import selection_bias_note

    config, report = run.config, run.report
    names, matrix = _names(run), report["confusion_matrix"]
    shown = _mistakes(run)
    return {
        "title": f"{config['model']} on {config['dataset']}",
        "path": str(run.path),
        "report": report,
        "caveat": selection_bias_note("test", report["selection_split"]),
        "history": run.history,
        "time": console.duration(sum(r["train_seconds"] + r["eval_seconds"] for r in run.history)),
        "curves": _embedded(plots.png(lambda: plots.curves(run)), "png"),
        "plots": [f"{PLOTS}/{p.name}" for p in sorted((run.path / PLOTS).glob("*.png"))],
        "settings": settings(config),
        "recipe": config["recipe"],
        "facts": [(name.replace("_", " "), config[name]) for name in FACTS if config.get(name)],
        "versions": config["versions"],
        "names": names,
        "labels": [
            (plots.short(name, plots.MAX_LONG_NAME_LENGTH), plots.short(name, NARROW_SCREEN_NAME))
            for name in names
        ],
        "matrix": matrix if len(names) <= IN_FULL else None,
        "confusions": run.confusions(CONFUSIONS),
        "num_mistakes": report["num_samples"] - sum(row[i] for i, row in enumerate(matrix)),
        "num_pictures": len(shown),
        "data": {
            "names": names,
            "totals": [sum(row) for row in matrix],
            "pictures": shown,
        },
    }


def settings(config: dict[str, Any]) -> list[tuple[str, Any, Any, bool]]:
    """(setting, the run's, the recipe's, whether these differ), but for where files are put.

    None is the recipe's where recipes leave the setting alone.
    """
    try:
        given = {name: config[name] for name in ("model", "dataset", "recipe")}
        recipe = dataclasses.asdict(resolve(given))
    except UserError:  # of a version that knew more
        recipe = {}
    rows = []
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] != OUTPUT and field.name in config:
            value = config[field.name]
            of_recipe = field.metadata.get("from_recipe", False)
            usual = recipe.get(field.name, value) if of_recipe else None
            rows.append((field.name, value, usual, of_recipe and value != usual))
    return rows


def _mistakes(run: RunResult) -> list[tuple[int, int, str, float, str]]:
    """(true class, predicted class, name, confidence, picture) of what the run kept, to the limit.

    The name is the picture's file, or #INDEX. The most telling come first: see
    `lab.report.mistakes.chosen`.
    """
    pictures = run.pictures()
    if pictures is None or run.predictions is None or run.confidence is None:
        return []
    found, size = [], 0
    columns = (pictures[name] for name in ("mistakes_labels", "mistakes_index", "mistakes"))
    for label, index, image in zip(*columns, strict=True):
        picture = _thumbnail(image)
        name = run.files[index] if run.files else f"#{index}"
        size += len(picture) + len(name)
        if size > PICTURE_BYTES:
            break
        prediction, confidence = int(run.predictions[index]), float(run.confidence[index])
        found.append((int(label), prediction, name, round(confidence, 4), picture))
    return found


def _thumbnail(image: np.ndarray) -> str:
    """uint8 [C, H, W] as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    if max(picture.size) <= EXACT_SIDE:
        picture.save(file, "PNG")
        return _embedded(file.getvalue(), "png")
    picture.save(file, "JPEG", quality=90)
    return _embedded(file.getvalue(), "jpeg")


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
