"""Tracking: tells TensorBoard, W&B, MLflow or Trackio of a run, through Accelerate's trackers.

A run's own files are complete without them. So whatever a tracker does wrong, the run says so once
and goes on; and each has a thread of its own, so that a network that hangs holds up no step.

Their classes are used without the Accelerator: its `log` stops at the first tracker that fails, its
`end_training` takes the processes apart, and it wants a folder before the run has one.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from lab import console
from lab.config import TrainConfig
from lab.errors import UserError
from lab.options import listed
from lab.rundir import STEPS, TRACKED, RunDir, write_atomically

PROJECT = "lab"
PATIENCE = 20.0  # seconds that a run waits for a tracker to begin, and for all of them to end


def require_packages(config: TrainConfig, needed: bool) -> None:
    """Nothing; raises `UserError` where a tracker that this process needs is not installed."""
    for name in listed(config.tracker) if needed else ():
        if find_spec(name) is None:
            raise UserError(
                f"--tracker {name} needs the package {name}",
                f"Run pip install -e '.[{name}]' in lab's checkout",
            )


class Tracking:
    """What the trackers of a run are told; nothing off the main process."""

    def __init__(self, run: RunDir, settings: Mapping[str, Any], step: int):
        """`settings`: the run's; `step`: how many steps it had taken, when it goes on."""
        self.run = run
        names = listed(settings["tracker"]) if run.writes else ()
        if not names:
            self.threads: list[_Thread] = []
            return
        key, known = _read(run)
        text = json.dumps({"key": key, "known": sorted({*known, *names})}) + "\n"
        write_atomically(run.path / TRACKED, lambda path: path.write_text(text))
        told = {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str)}
        self.threads = [
            _Thread(name, partial(_begin, name, run, key, step, told, name in known))
            for name in names
        ]
        for thread in self.threads:
            thread.ready.wait(PATIENCE)
        # A state's last step is told again, as what was told from there on is taken back.
        for line in (run.path / STEPS).read_text().splitlines()[-1:] if step else ():
            row = json.loads(line)
            if row["step"] == step:
                self.step(row)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind and issubclass(kind, Exception):  # a second Ctrl-C waits for nobody
            self.finish()

    def step(self, row: Mapping[str, Any]) -> None:
        """A line of steps.jsonl."""
        told = {name: row[name] for name in ("loss", "learning_rate")}
        self._log("steps", told, row["step"])

    def epoch(self, row: Mapping[str, Any], step: int) -> None:
        """A line of history.jsonl, after `step` steps."""
        self._log("epochs", row, step)

    def finish(self, report: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """The numbers of report.json and the pictures of the run, if it has come that far; the end.

        Trackers that are not done soon are left behind, with a warning.
        """
        if report:
            self._log("test", report, step)
            for path in self.run.pictures if self.threads else ():
                self._tell(partial(_Log.picture, path=path, step=step))
        for thread in self.threads:
            thread.calls.put(None)
        end = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                console.warn(f"{thread.name} has not taken all that it was told; not waited for")

    def _log(self, group: str, row: Mapping[str, Any], step: int) -> None:
        numbers = {f"{group}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        self._tell(partial(_Log.numbers, numbers=numbers, step=step))

    def _tell(self, call: Callable[["_Log"], None]) -> None:
        for thread in self.threads:
            if thread.is_alive():  # or the calls would pile up
                thread.calls.put(call)


def _read(run: RunDir) -> tuple[str, set[str]]:
    """(what trackers know the run by, the names of those that have a log of it)."""
    try:
        content = json.loads((run.path / TRACKED).read_bytes())
        key, known = content["key"], set(content["known"])
        if isinstance(key, str) and key.isalnum():
            return key, known
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none yet; or damaged, and then a new log is begun
    return secrets.token_hex(4), set()


class _Log:
    """One tracker's log of the run."""

    def __init__(self, tracker: GeneralTracker, told: Mapping[str, int]):
        self.tracker = tracker
        self.told = told  # the last step of each number that it has, where it takes nothing back

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        new = {name: n for name, n in numbers.items() if step > self.told.get(name, -1)}
        if new:
            self.tracker.log(new, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Shows a PNG, if the tracker can."""
        if hasattr(self.tracker, "log_artifact"):
            self.tracker.log_artifact(str(path), path.parent.name)
        elif hasattr(self.tracker, "log_images"):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]  # [1, H, W, 3]
            more = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
            self.tracker.log_images({f"{path.parent.name}/{path.stem}": pixels}, step=step, **more)


class _Thread(Thread):
    """Speaks to one tracker, until it fails or the run ends. MLflow's runs belong to a thread."""

    def __init__(self, name: str, begin: Callable[[], _Log]):
        super().__init__(name=name, daemon=True)
        self.begin, self.ready = begin, Event()
        self.calls: SimpleQueue[Callable[[_Log], None] | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        try:
            log = self.begin()
            self.ready.set()
            while call := self.calls.get():
                call(log)
            log.tracker.finish()
        except Exception as error:  # of whatever a tracker or its network can raise
            reason = f"{type(error).__name__}: {error}"
            console.warn(f"{self.name} failed, and the run goes on without it ({reason})")
        finally:
            self.ready.set()


def _begin(
    name: str, run: RunDir, key: str, step: int, settings: dict[str, Any], known: bool
) -> _Log:
    """A tracker's log, begun, or gone on with where it is `known`."""
    tracker = _make(name, run, key, step)
    tracker.start()
    if not known:  # MLflow refuses other values of settings that it has
        tracker.store_init_configuration(settings)
    return _Log(tracker, _told(name, tracker) if known else {})


def _make(name: str, run: RunDir, key: str, step: int) -> GeneralTracker:
    """Accelerate's tracker, set to go on with the log that has the run's `key`, if there is one."""
    make = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # Hides what was told of this step and of later ones, which are done again.
        return make(name, str(run.path), purge_step=step or None)
    if name == "wandb":
        # The server takes no step again that it has. What is printed is left alone.
        where = {"dir": str(run.path), "settings": {"console": "off"}}
        return make(PROJECT, id=key, name=run.path.name, resume="allow", **where)
    if name == "mlflow":
        import mlflow

        found = mlflow.search_runs(
            search_all_experiments=True,
            filter_string=f"tags.`lab.key` = '{key}'",
            output_format="list",
        )
        run_id = found[0].info.run_id if found else None
        return make(PROJECT, run_id=run_id, run_name=run.path.name, tags={"lab.key": key})
    return make(PROJECT, name=f"{run.path.name}-{key}", resume="allow")  # trackio


def _told(name: str, tracker: GeneralTracker) -> dict[str, int]:
    """The last step of each number that a log has, of trackers that would show a step twice."""
    last: dict[str, int] = {}
    if name == "mlflow":
        from mlflow import MlflowClient

        info, client = tracker.tracker.info, MlflowClient()
        for key in client.get_run(info.run_id).data.metrics:
            last[key] = max(m.step for m in client.get_metric_history(info.run_id, key))
    if name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        for row in SQLiteStorage.get_logs(PROJECT, tracker.tracker.name):
            last |= {key: max(row["step"], last.get(key, -1)) for key in row if "/" in key}
    return last
