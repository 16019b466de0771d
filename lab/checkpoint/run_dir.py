"""The one place that knows the names of a run's files, and how they are written."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from lab.checkpoint.atomic_io import (
    os_errors_as_user_errors,
    sync,
    to_json,
    write_atomically,
)
from lab.checkpoint.provenance import commit, versions
from lab.config.schema import TrainConfig
from lab.distributed import raise_on_all_ranks
from lab.errors import UserError

CONFIG, HISTORY, STEPS = "config.json", "history.jsonl", "steps.jsonl"
BEST, REPORT, PREDICTIONS = "best.safetensors", "report.json", "predictions.csv"
PICTURES, PLOTS, PAGE = "pictures.safetensors", "plots", "report.html"
CARD, TRACKED = "README.md", "trackers.json"
CHECKPOINTS, LOCK = "checkpoints", ".lock"

# Seconds to wait for the lock: workers of a killed training, which hold it too, end within five.
LOCK_PATIENCE = 8


class RunDir:
    """A run's folder. Off the main process (`writes` False) every write is a no-op."""

    def __init__(self, path: str | Path, is_main_process: bool = True):
        self.path, self.is_main_process = Path(path), is_main_process
        self.exit_code = 0  # of train.py; another one if the run was interrupted
        self.held: FileLock | None = None
        self.made: list[Path] = []  # directories made for a run that has not begun, inner first

    @property
    def best(self) -> Path:
        """The best epoch's weights."""
        return self.path / BEST

    @property
    def checkpoints_dir(self) -> Path:
        """The folder of the states to resume from."""
        return self.path / CHECKPOINTS

    @property
    def pictures(self) -> list[Path]:
        """The pictures that were drawn of it."""
        return sorted((self.path / PLOTS).glob("*.png"))

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints to resume from, the newest first."""
        return sorted(self.checkpoints_dir.glob("step-*"), reverse=True)

    def make_directory(self) -> bool:
        """Make the directory; return False where there is one. Raise `UserError`."""
        missing = [p for p in (self.path, *self.path.parents) if not os.path.exists(p)]
        try:
            with os_errors_as_user_errors(self.path):
                self.path.mkdir(parents=True)
                if os.name == "posix":
                    sync(self.path.parent)  # or a power cut might take the whole directory
        except UserError as error:
            if isinstance(error.__cause__, FileExistsError) and self.path.parent.is_dir():
                return False
            _remove_empty(missing)
            raise
        self.made = missing
        return True

    def lock(self) -> None:
        """Keep other trainings out of the directory until `close`, or until this process ends.

        Raise `UserError` where another training holds the lock; a killed one holds none.
        """
        with os_errors_as_user_errors(self.checkpoints_dir):
            self.checkpoints_dir.mkdir(exist_ok=True)
            _lock_file = FileLock(self.checkpoints_dir / LOCK)
            with suppress(Timeout):
                _lock_file.acquire(timeout=LOCK_PATIENCE)
        if (
            not _lock_file.is_locked or not (self.checkpoints_dir / LOCK).exists()
        ):  # removed by who held it
            raise UserError(
                f"another training is at work in {self.path}",
                "Wait for its end, or give another --name; if there is none, delete "
                f"{self.checkpoints_dir / LOCK}",
            )
        self.held = _lock_file

    def close(self) -> None:
        """Let other trainings in; remove a directory that was made for a run that did not begin."""
        if self.held:
            if self.made:
                shutil.rmtree(self.path, ignore_errors=True)
                _remove_empty(self.made)
            self.held.release()
            self.held = None

    def create(self, settings: Mapping[str, Any]) -> None:
        """Empty the directory, if it is locked; write config.json and two files to add lines to.

        config.json holds every setting as resolved, where the run takes place, and the versions of
        the code. Raise `UserError`.
        """
        if not self.is_main_process:
            return
        self.made = self.made or [self.path]  # there is no run in it until all this is done
        with os_errors_as_user_errors(self.path):
            for path in (
                (*self.checkpoints_dir.iterdir(), *self.path.iterdir()) if self.held else ()
            ):
                if path.name not in (
                    LOCK,
                    CONFIG,
                    CHECKPOINTS,
                ):  # it stays known as a run's, and locked
                    _remove(path)
        self._write_config(settings)
        self.add_epoch()
        self.add_steps()
        self.made = []

    def resume(self, settings: Mapping[str, Any], epoch: int, step: int) -> None:
        """What `begin` does, for a run that goes on in `epoch` (from 1), after `step` steps.

        The lines of what will be done again are taken away, and the files of its former end.
        """
        if not self.is_main_process:
            return
        self._write_config(settings)
        self._split(HISTORY, lambda row: row["epoch"] < epoch)
        self._split(STEPS, lambda row: row["step"] <= step)
        with os_errors_as_user_errors(self.path):
            for name in (REPORT, PREDICTIONS, PICTURES, PAGE, CARD):
                (self.path / name).unlink(missing_ok=True)
            if (self.path / PLOTS).exists():
                shutil.rmtree(self.path / PLOTS)
            for leftover in self.path.glob(".*.tmp"):  # of writers that were killed
                leftover.unlink()

    def sync_lines(self) -> None:
        """Returns when the disk has the lines that were added."""
        for name in (HISTORY, STEPS):
            sync(self.path / name)

    def write_report(self, report: Mapping[str, Any]) -> None:
        """report.json: the numbers of `lab.engine.metrics.report` and what they were measured on."""
        self._write_json(REPORT, report)

    def write_predictions(self, content: bytes) -> None:
        """predictions.csv, as `lab.engine.evaluation.Predictions.csv` makes it."""
        if self.is_main_process:
            write_atomically(self.path / PREDICTIONS, lambda path: path.write_bytes(content))

    def check_trained(self, accelerator: Accelerator) -> None:
        """Raise `UserError` on all processes if every step was skipped or every epoch diverged."""
        with raise_on_all_ranks(accelerator):
            lines = (self.path / HISTORY).read_text().splitlines() if self.is_main_process else []
            rows = [json.loads(line) for line in lines]
            if rows and all(None in (row["train_loss"], row["val_loss"]) for row in rows):
                raise UserError(
                    "the model has not learned anything: the loss of every epoch was not finite",
                    "Start a new run with a lower --lr, or with --max-grad-norm 1",
                )

    def add_epoch(self, *rows: Mapping[str, Any]) -> None:
        """Lines of history.jsonl."""
        self._append(HISTORY, rows)

    def add_steps(self, *rows: Mapping[str, Any]) -> None:
        """Lines of steps.jsonl."""
        self._append(STEPS, rows)

    def _write_config(self, settings: Mapping[str, Any]) -> None:
        if self.is_main_process:
            self._write_json(CONFIG, {**settings, "versions": versions(), "commit": commit()})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.is_main_process:
            text = to_json(content, indent=1) + "\n"
            write_atomically(self.path / name, lambda path: path.write_text(text))

    def _split(self, name: str, stays: Callable[[dict], bool]) -> None:
        """Keeps the lines up to the first that does not stay, or is no whole line."""
        path, kept = self.path / name, []
        with os_errors_as_user_errors(path):
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                try:
                    if not line.endswith(b"\n") or not stays(json.loads(line)):
                        break
                except (ValueError, LookupError, TypeError):
                    break
                kept.append(line)
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(kept)))

    def _append(self, name: str, rows: Iterable[Any]) -> None:
        if self.is_main_process:
            text = "".join(to_json(row) + "\n" for row in rows).encode()
            with (
                os_errors_as_user_errors(self.path / name),
                open(self.path / name, "ab", buffering=0) as file,
            ):
                size = file.tell()
                if file.write(text) < len(text):  # the disk filled up: leave no part of a line
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_new(config: TrainConfig) -> RunDir:
    """Return the locked directory of a run that has no checkpoint; `RunDir.begin` empties it.

    Under the lock it is known whether a run may be replaced: only `--overwrite` may replace one
    that left weights or a report. With `--resume auto` the directory may hold checkpoints after
    all, of a training that ended meanwhile: the caller resumes those. Raise `UserError`.
    """
    parent, number = Path(config.output_dir), 1
    if not config.name:  # the first that is free: MODEL-DATASET, MODEL-DATASET-2, ...
        base = f"{config.model}-{config.dataset}".replace(":", "-")  # torchvision:NAME
        run = RunDir(parent / base)
        while not run.make_directory():
            number += 1
            run = RunDir(parent / f"{base}-{number}")
        run.lock()
        return run
    run = RunDir(parent / config.name)
    if run.make_directory():
        run.lock()
        return run
    check_replaceable(run, config)
    run.lock()
    try:
        check_replaceable(run, config)
    except UserError:
        run.close()
        raise
    return run


def check_replaceable(run: RunDir, config: TrainConfig) -> None:
    """Check that a run may begin in a directory that is there. Raise `UserError`."""
    if config.resume == "auto" and (run.checkpoints or is_blank(run.path)):
        return
    if config.resume == "auto" and (run.best.exists() or (run.path / REPORT).exists()):
        raise no_checkpoint(run)
    if config.resume != "auto" and not config.overwrite and not is_blank(run.path):
        raise UserError(
            f"the run {run.path} exists", "Give another --name, or --overwrite to replace it"
        )
    if not is_run(run.path):
        raise UserError(f"{run.path} is not a run's folder", "Give another --name")


def no_checkpoint(run: RunDir) -> UserError:
    """Return the error of resuming a run that has no checkpoint."""
    inside = sorted({str(path.parents[1]) for path in run.path.glob(f"*/{CHECKPOINTS}/step-*")})
    return UserError(
        f"{run.path} holds no state to go on from",
        f"Give --resume one of its runs: {', '.join(inside[:3])}"
        if inside
        else "Start a new run, of another --name",
    )


def evaluation_dir(
    weights: Path, part: str, output: str, is_main_process: bool, tta: str = "none"
) -> RunDir:
    """The folder of an evaluation's files: `output`, or evaluate-`part` beside the weights.

    With test-time augmentation it is one beside that, whose name ends in -tta-`tta`.
    """
    path = Path(output) if output else weights.parent / f"evaluate-{part}"
    if tta != "none":
        path = Path(f"{os.path.abspath(path) if output else path}-tta-{tta}")
    if is_main_process:
        with os_errors_as_user_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    return RunDir(path, is_main_process)


def is_blank(path: Path) -> bool:
    """Return whether a directory is empty but for the lock of a run that did not begin."""
    try:
        names = {p.name for p in path.iterdir()}
        return names <= {CHECKPOINTS} and not {p.name for p in (path / CHECKPOINTS).glob("*")} - {
            LOCK
        }
    except OSError:
        return False


def is_run(path: Path) -> bool:
    """Return whether a directory is a run's, or blank: one that may be replaced."""
    try:
        return is_blank(path) or "lab" in json.loads((path / CONFIG).read_bytes())["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_empty(paths: Iterable[Path]) -> None:
    """Remove those of the directories that are empty."""
    for path in paths:
        with suppress(OSError):
            path.rmdir()
