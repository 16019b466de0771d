"""Log a run to TensorBoard or Weights & Biases through Accelerate's trackers.

The files of a run are complete without them, so a tracker that fails is dropped with one warning.
`Accelerator.log` would raise in the middle of a step instead.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from lab import console
from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import STEPS, TRACKED, RunDir
from lab.config.schema import TrainConfig, split_list
from lab.errors import UserError, install_hint
from lab.report.markdown import escaped, table

PROJECT = "lab"


def check_packages(config: TrainConfig, needed: bool) -> None:
    """Raise `UserError` if the package of a tracker is missing and `needed` on this process."""
    for name in split_list(config.tracker) if needed else ():
        if find_spec(name) is None:
            raise UserError(f"--tracker {name} needs the package {name}", install_hint(name))


class Loggers:
    """Log a run to its files and its trackers, from the main process alone."""

    def __init__(self, run: RunDir, settings: Mapping[str, Any], step: int):
        """Start the trackers that `settings` name; `step` is the number of steps already taken."""
        self.run, self.trackers = run, dict[str, GeneralTracker]()
        scalars = {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str)}
        for name in split_list(settings["tracker"]) if run.is_main_process else ():
            self._guard(name, self._start, name, scalars, step)
        # Resuming purges the step of the checkpoint from TensorBoard: log that step again. Only the
        # main process, which has the trackers, can read the file.
        logged = (run.path / STEPS).read_text().splitlines() if step and self.trackers else []
        for line in logged[-1:]:
            row = json.loads(line)
            if row["step"] == step:
                self._log_step(row)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind and issubclass(kind, Exception):
            self.finish()

    def step(self, row: Mapping[str, Any]) -> None:
        """Add a line to steps.jsonl, and log it."""
        self.run.add_steps(row)
        self._log_step(row)

    def _log_step(self, row: Mapping[str, Any]) -> None:
        self._log("steps", {name: row[name] for name in ("loss", "learning_rate")}, row["step"])

    def epoch(self, row: Mapping[str, Any], step: int) -> None:
        """Add a line to history.jsonl, and log it, after `step` steps."""
        self.run.add_epoch(row)
        self._log("epochs", row, step)

    def finish(self, report: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Log the metrics of report.json and the run's plots, where there are any; then close."""
        if report:
            self._log("test", report, step)
        for name in list(self.trackers):
            self._guard(name, self._close, name, step if report else None)
        self.trackers.clear()

    def _log(self, group: str, row: Mapping[str, Any], step: int) -> None:
        numbers = {f"{group}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        for name, tracker in list(self.trackers.items()):
            self._guard(name, tracker.log, numbers, step=step)

    def _guard(self, name: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call a tracker; drop it with one warning if it fails."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # of any type: trackers use the network and the disk
            self.trackers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            console.warn(f"--tracker {name} failed; the run continues without it ({reason})")

    def _start(self, name: str, settings: dict[str, Any], step: int) -> None:
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            # Discard everything logged from this step on: those steps are repeated.
            tracker = make(name, str(self.run.path), purge_step=step or None)
            tracker.start()
            # As text, because Accelerate's hyperparameters would create a second, empty run.
            rows = [(escaped(key), escaped(value)) for key, value in settings.items()]
            tracker.log({"settings": table(("setting", "value"), rows)}, step=step)
        else:
            where = {"dir": str(self.run.path), "settings": {"console": "off"}}
            metadata = {"id": self._wandb_id(), "name": self.run.path.name, "resume": "allow"}
            tracker = make(PROJECT, **metadata, **where)
            tracker.start()
            tracker.store_init_configuration(settings)
        self.trackers[name] = tracker

    def _wandb_id(self) -> str:
        """Return the W&B id of the run from trackers.json, or a new one."""
        path = self.run.path / TRACKED
        try:
            saved = json.loads(path.read_bytes())["wandb_id"]
            if isinstance(saved, str) and saved.isalnum():
                return saved
        except (OSError, ValueError, LookupError, TypeError):
            pass
        new = secrets.token_hex(4)
        write_atomically(path, json.dumps({"wandb_id": new}) + "\n")
        return new

    def _close(self, name: str, step: int | None) -> None:
        """Close a tracker; log the plots before if the run finished at `step`."""
        tracker: Any = self.trackers[name]
        for path in self.run.plot_files if step is not None else ():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))[None]  # [1, H, W, 3]
            more = {"dataformats": "NHWC"} if name == "tensorboard" else {}
            tracker.log_images({f"{path.parent.name}/{path.stem}": pixels}, step=step, **more)
        tracker.finish()
