"""The directory of a run: the names of its files, how they are written, and its lock."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lab import console
from lab.checkpoint.atomic_io import os_errors_as_user_errors, sync, to_json, write_atomically
from lab.checkpoint.provenance import commit, versions
from lab.config.schema import TrainConfig
from lab.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG, HISTORY, STEPS = "config.json", "history.jsonl", "steps.jsonl"
BEST, REPORT, PREDICTIONS = "best.safetensors", "report.json", "predictions.csv"
PROBABILITIES = "predictions.safetensors"
IMAGES, PLOTS, PAGE = "images.safetensors", "plots", "report.html"
CARD, TRACKED = "README.md", "trackers.json"
CHECKPOINTS, LOCK = "checkpoints", ".lock"

# A killed run leaves loader workers, which hold its lock for up to five seconds more.
LOCK_TIMEOUT_SECONDS = 8


class RunDir:
    """The directory of a run. Only the main process writes; on the others, writes do nothing."""

    def __init__(self, path: str | Path, is_main_process: bool = True):
        self.path, self.is_main_process = Path(path), is_main_process
        self.exit_code = 0  # of train.py
        self.interrupted = False  # by a signal or the time limit: the run is not finished
        self._lock: FileLock | None = None
        self._created_directories: list[Path] = []  # removed unless the run starts, inner first

    @property
    def best(self) -> Path:
        """The file with the weights of the best epoch."""
        return self.path / BEST

    @property
    def checkpoints_dir(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def plot_files(self) -> list[Path]:
        """The plots of the run, sorted by name."""
        return sorted((self.path / PLOTS).glob("*.png"))

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.checkpoints_dir.glob("step-*"), reverse=True)

    @property
    def is_finished(self) -> bool:
        """Return whether the run was trained to its end: the model card is written last."""
        return all((self.path / name).exists() for name in (REPORT, CARD))

    def make_directory(self) -> bool:
        """Create the directory; return False if it exists. Raises `UserError` if that fails."""
        missing = [p for p in (self.path, *self.path.parents) if not os.path.exists(p)]
        try:
            with os_errors_as_user_errors(self.path):
                self.path.mkdir(parents=True)
                if os.name == "posix":
                    sync(self.path.parent)  # or a power failure could lose the whole directory
        except UserError as error:
            if isinstance(error.__cause__, FileExistsError) and self.path.parent.is_dir():
                return False
            _remove_empty(missing)
            raise
        self._created_directories = missing
        return True

    def lock(self) -> None:
        """Lock the directory until `close` is called or this process ends.

        Raises `UserError` if another process has locked it.
        """
        path = self.checkpoints_dir / LOCK
        with os_errors_as_user_errors(self.checkpoints_dir):
            self.checkpoints_dir.mkdir(exist_ok=True)
            lock = FileLock(path)
            with suppress(Timeout):
                lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
        # A run that did not start removes its directory, and the lock with it.
        if not lock.is_locked or not path.exists():
            raise UserError(
                f"another process is training in {self.path}",
                f"Wait until it ends, or give another --name; if there is none, delete {path}",
            )
        self._lock = lock
        if not is_blank(self.path):  # another process trained here before this one had the lock
            self._created_directories = []

    def close(self) -> None:
        """Unlock the directory, and remove it if it was created for a run that did not start."""
        if self._lock:
            if self._created_directories:
                shutil.rmtree(self.path, ignore_errors=True)
                _remove_empty(self._created_directories)
            self._lock.release()
            self._lock = None

    def create(self, settings: Mapping[str, Any]) -> None:
        """Start a new run: empty the directory if it is locked, and write its first files.

        config.json receives `settings` (the resolved options, the device, the fingerprints) and the
        versions of the code. Raises `UserError` if a file cannot be written.
        """
        if not self.is_main_process:
            return
        # If this fails halfway, `close` removes the directory.
        self._created_directories = self._created_directories or [self.path]
        with os_errors_as_user_errors(self.path):
            paths = [*self.checkpoints_dir.iterdir(), *self.path.iterdir()] if self._lock else []
            for path in paths:
                # The directory stays locked, and config.json identifies it as a run's.
                if path.name not in (LOCK, CONFIG, CHECKPOINTS):
                    _remove(path)
        self._write_config(settings)
        self.add_epoch()
        self.add_steps()
        self._created_directories = []

    def resume(self, settings: Mapping[str, Any], epoch: int, step: int) -> None:
        """Continue a run in `epoch` (from 1) after `step` steps.

        Remove the lines of the steps and epochs that will be repeated, and the files that are
        written at the end of a run. Raises `UserError` if a file cannot be written.
        """
        if not self.is_main_process:
            return
        self._write_config(settings)
        self._truncate(HISTORY, lambda row: row["epoch"] < epoch)
        self._truncate(STEPS, lambda row: row["step"] <= step)
        with os_errors_as_user_errors(self.path):
            for name in (REPORT, PREDICTIONS, PROBABILITIES, IMAGES, PAGE, CARD):
                (self.path / name).unlink(missing_ok=True)
            if (self.path / PLOTS).exists():
                shutil.rmtree(self.path / PLOTS)
            for leftover in self.path.glob(".*.tmp"):  # of processes that were killed
                leftover.unlink()

    def sync_lines(self) -> None:
        """Wait until the added lines are on the disk."""
        for name in (HISTORY, STEPS):
            sync(self.path / name)

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json: the metrics of the test split, and how the weights were selected."""
        self._write_json(REPORT, report)

    def write_predictions(self, content: bytes, probabilities: bytes | None) -> None:
        """Write predictions.csv and predictions.safetensors.

        `lab.engine.evaluation.Predictions` formats both. `probabilities` are None if they are too
        large; those of an earlier evaluation are deleted.
        """
        if not self.is_main_process:
            return
        write_atomically(self.path / PREDICTIONS, content)
        path = self.path / PROBABILITIES
        if probabilities is not None:
            write_atomically(path, probabilities)
            return
        console.info(f"no {PROBABILITIES}: it would be larger than 200 MB")
        with os_errors_as_user_errors(path):
            path.unlink(missing_ok=True)

    def check_trained(self, accelerator: "Accelerator") -> None:
        """Raise `UserError` on all processes if every step was skipped or every epoch diverged."""
        from lab.distributed import raise_on_all_ranks  # --help needs no PyTorch

        with raise_on_all_ranks(accelerator):
            lines = (self.path / HISTORY).read_text().splitlines() if self.is_main_process else []
            rows = [json.loads(line) for line in lines]
            if rows and all(None in (row["train_loss"], row["val_loss"]) for row in rows):
                raise UserError(
                    "the model has not learned anything: the loss of every epoch was not finite",
                    "Start a new run with a lower --lr, or with --max-grad-norm 1",
                )

    def add_epoch(self, *rows: Mapping[str, Any]) -> None:
        """Append lines to history.jsonl."""
        self._append(HISTORY, rows)

    def add_steps(self, *rows: Mapping[str, Any]) -> None:
        """Append lines to steps.jsonl."""
        self._append(STEPS, rows)

    def _write_config(self, settings: Mapping[str, Any]) -> None:
        self._write_json(CONFIG, {**settings, "versions": versions(), "commit": commit()})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.is_main_process:
            write_atomically(self.path / name, to_json(content, indent=1) + "\n")

    def _truncate(self, name: str, keep: Callable[[dict], bool]) -> None:
        """Remove the lines of a file from the first that is incomplete or not to be kept."""
        path, lines = self.path / name, []
        with os_errors_as_user_errors(path):
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                try:
                    if not line.endswith(b"\n") or not keep(json.loads(line)):
                        break
                except (ValueError, LookupError, TypeError):
                    break
                lines.append(line)
        write_atomically(path, b"".join(lines))

    def _append(self, name: str, rows: Iterable[Any]) -> None:
        if self.is_main_process:
            text = "".join(to_json(row) + "\n" for row in rows).encode()
            with (
                os_errors_as_user_errors(self.path / name),
                open(self.path / name, "ab", buffering=0) as file,
            ):
                size = file.tell()
                if file.write(text) < len(text):  # the disk is full: leave no incomplete line
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_new(config: TrainConfig) -> RunDir:
    """Return the locked directory of a new run; `RunDir.create` empties it.

    Only --overwrite may replace a run that has weights or a report. With --resume auto, the
    directory may contain a run to resume. Raises `UserError` if it cannot be created, locked or
    replaced.
    """
    parent, number = Path(config.output_dir), 1
    if not config.name:  # the first unused one of MODEL-DATASET, MODEL-DATASET-2, ...
        base = f"{config.model_title}-{config.dataset_title}".replace(":", "-")
        base = base.encode("utf-8", "ignore").decode()  # as weights are only read from UTF-8 paths
        run = RunDir(parent / base)
        while not run.make_directory():
            number += 1
            run = RunDir(parent / f"{base}-{number}")
        run.lock()
        if is_blank(run.path):
            return run
        run.close()  # another process gave this name, and trained here before `lock`
        return open_new(config)
    run = RunDir(parent / config.name)
    if not run.make_directory():
        check_replaceable(run, config)  # before `lock` writes into it
    run.lock()
    try:
        check_replaceable(run, config)  # again, because another process may have trained in it
    except UserError:
        run.close()
        raise
    return run


def check_replaceable(run: RunDir, config: TrainConfig) -> None:
    """Raise `UserError` if no run may start or be resumed in a directory that exists."""
    if config.resume == "auto":
        if run.checkpoints or is_blank(run.path) or run.is_finished:
            return
        if run.best.exists() or (run.path / REPORT).exists():
            raise no_checkpoint(run)
    if config.resume != "auto" and not config.overwrite and not is_blank(run.path):
        raise UserError(
            f"the run {run.path} exists", "Give another --name, or --overwrite to replace it"
        )
    if not is_run(run.path):
        raise UserError(f"{run.path} is not the directory of a run", "Give another --name")


def no_checkpoint(run: RunDir) -> UserError:
    """Return the error of resuming a run that has no checkpoint."""
    runs = sorted({str(path.parents[1]) for path in run.path.glob(f"*/{CHECKPOINTS}/step-*")})
    hint = f"Give --resume one of its runs: {', '.join(runs[:3])}"
    return UserError(
        f"{run.path} contains no checkpoint to resume from",
        hint if runs else "Start a new run with another --name",
    )


def evaluation_dir(
    weights: Path,
    part: str,
    output: str,
    is_main_process: bool,
    tta: str = "none",
    is_test_of_run: bool = False,
) -> RunDir:
    """Return the directory for the files of an evaluation, which the main process creates.

    It is `output`, or evaluate-PART beside the weights, with -tta-TTA appended to its name if
    test-time augmentation is used. Raises `UserError` if it cannot be created, or if it is a run or
    a cross-validation whose test results something else would replace: `is_test_of_run` says that
    the weights are evaluated on the test split of their own run.
    """
    path = Path(output) if output else weights.parent / f"evaluate-{part}"
    if tta != "none":
        path = Path(f"{os.path.abspath(path) if output else path}-tta-{tta}")
    is_run_dir = os.path.exists(path / CONFIG)  # Path.exists raises for a name that is too long
    if is_run_dir and not (is_test_of_run and path.samefile(weights.parent)):
        raise UserError(
            f"{path} is a run, whose test results would be replaced", "Give another --output"
        )
    if os.path.isdir(path) and any(path.glob(f"fold-*/{CONFIG}")):
        raise UserError(
            f"{path} is a cross-validation, whose results would be replaced",
            "Give another --output",
        )
    if is_main_process:
        with os_errors_as_user_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    return RunDir(path, is_main_process)


def is_blank(path: Path) -> bool:
    """Return whether a directory contains nothing but the lock of a run that did not start."""
    try:
        names = {p.name for p in path.iterdir()}
        checkpoints = {p.name for p in (path / CHECKPOINTS).glob("*")}
    except OSError:
        return False
    return names <= {CHECKPOINTS} and checkpoints <= {LOCK}


def is_run(path: Path) -> bool:
    """Return whether a directory contains a run or nothing, so that it may be replaced."""
    try:
        return is_blank(path) or "lab" in json.loads((path / CONFIG).read_bytes())["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _remove(path: Path) -> None:
    """Remove a file or a directory tree."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_empty(paths: Iterable[Path]) -> None:
    """Remove the directories that are empty."""
    for path in paths:
        with suppress(OSError):
            path.rmdir()
