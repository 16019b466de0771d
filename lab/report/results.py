"""Write and print the results of a run that has finished training."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

from lab import console
from lab.config.schema import is_code
from lab.distributed import raise_on_all_ranks
from lab.engine.metrics import selection_bias_note
from lab.own_code import OBJECT
from lab.report import explain, html, mistakes, model_card, plots

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lab.checkpoint.run_dir import RunDir
    from lab.config.schema import TrainConfig
    from lab.data.splits import Splits
    from lab.engine.evaluation import Predictions

DRAW_VARIABLE = "LAB_DRAW"  # set to "0" in the environment, it turns off the plots and the page


def write_results(
    accelerator: Accelerator,
    run: RunDir,
    config: TrainConfig,
    splits: Splits,
    predictions: Predictions,
    best_epoch: int,
    temperature: float,
) -> dict[str, Any]:
    """Write and print the results on the test split, and return the content of report.json.

    The logits of the `predictions` were divided by `temperature`. The main process writes the
    predictions, report.json, the plots, the page and, last, the model card, which marks the run as
    finished. Raises `UserError` on all processes if a file cannot be written; only warns if plots
    or page fail.
    """
    report = {
        "split": "test",
        **predictions.report(),
        "best_epoch": best_epoch,
        "selection_split": splits.selection_split,
    }
    if temperature != 1:
        report["temperature"] = temperature
    if warnings := splits.balance_warnings():
        report["warnings"] = warnings
    with raise_on_all_ranks(accelerator):
        run.write_predictions(predictions.csv(splits.test.files()), predictions.safetensors())
        run.write_report(report)
    console.report(
        report,
        title=f"{config.model_title} on {config.dataset_title}",
        files={"run": str(run.path)},
        command=evaluate_command(run, config),
        note=selection_bias_note("test", splits.selection_split),
    )
    if run.is_main_process:
        draw(run, config, splits, predictions, accelerator.device)
    with raise_on_all_ranks(accelerator):
        model_card.write(run)
    return report


def evaluate_command(run: RunDir, config: TrainConfig) -> str | None:
    """Return the command that evaluates the run again; None if no script can.

    Scripts run no code that only the weights name, and cannot see objects passed to `train.main`.
    """
    command = ["python", "evaluate.py", str(run.path)]
    for option, value in (("--model", config.model), ("--dataset", config.dataset)):
        if value.startswith(OBJECT):
            return None
        if is_code(value):
            command += [option, value]
    return shlex.join(command)


def draw(
    run: RunDir,
    config: TrainConfig,
    splits: Splits,
    predictions: Predictions,
    device: torch.device,
) -> None:
    """Write the images, the plots and the page of a finished run; if that fails, only warn."""
    try:
        drawn = os.environ.get(DRAW_VARIABLE) != "0"
        grad_cam = explain.load_grad_cam(run, device) if drawn else None
        mistakes.save_images(run, config, splits, predictions, grad_cam)
        if drawn:
            plots.draw(run.path)
            console.info(f"page: {html.write(run.path)}")
    except Exception as error:  # of the plots or the page: the run is complete without them
        console.warn(f"the plots or the page could not be written: {error}")
