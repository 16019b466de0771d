"""The one place that knows the names of a run's files, and how they are written."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lab.config import TrainConfig
from lab.disk import refused
from lab.errors import UserError
from lab.versions import commit, versions

CONFIG, HISTORY, STEPS = "config.json", "history.jsonl", "steps.jsonl"
BEST, REPORT, PREDICTIONS = "best.safetensors", "report.json", "predictions.csv"
PICTURES, PLOTS, PAGE = "pictures.safetensors", "plots", "report.html"
CARD, TRACKED = "README.md", "trackers.json"
STATES, LOCK = "state", ".lock"

# Seconds to wait for the lock: workers of a killed training, which hold it too, end within five.
LOCK_PATIENCE = 8


class RunDir:
    """A run's folder. Off the main process (`writes` False) every write is a no-op."""

    def __init__(self, path: str | Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.held: FileLock | None = None

    @property
    def best(self) -> Path:
        """The best epoch's weights."""
        return self.path / BEST

    @property
    def states(self) -> Path:
        """The folder of the states to resume from."""
        return self.path / STATES

    @property
    def pictures(self) -> list[Path]:
        """The pictures that were drawn of it."""
        return sorted((self.path / PLOTS).glob("*.png"))

    def lock(self) -> None:
        """Keeps other trainings out of the folder while this process lives.

        Raises `UserError` where another one is at work there; one that was killed locks nothing.
        """
        with writing(self.states):
            self.states.mkdir(exist_ok=True)
            # One a process: a notebook whose training failed may go on with it.
            self.held = FileLock(self.states / LOCK, is_singleton=True)
            try:
                self.held.acquire(timeout=LOCK_PATIENCE)
            except Timeout:
                self.held = None
                raise UserError(
                    f"another training is at work in {self.path}",
                    "Wait for its end, or give another --name; if there is none, delete "
                    f"{self.states / LOCK}",
                ) from None

    def unlock(self) -> None:
        """Lets other trainings in again."""
        if self.held:
            self.held.release(force=True)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """config.json, every setting as resolved, where the run takes place and by what code; and
        the two files that lines will be added to. Where that fails, the folder is gone again.
        """
        try:
            self._write_config(settings)
        except UserError:
            with suppress(OSError):
                shutil.rmtree(self.path)
            raise
        self.add_epoch()
        self.add_steps()

    def go_on(self, settings: Mapping[str, Any], epoch: int, step: int) -> None:
        """What `begin` does, for a run that goes on in `epoch` (from 1), after `step` steps.

        The lines of what will be done again are taken away, and the files of its former end.
        """
        if not self.writes:
            return
        self._write_config(settings)
        self._cut(HISTORY, lambda row: row["epoch"] < epoch)
        self._cut(STEPS, lambda row: row["step"] <= step)
        with writing(self.path):
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
        """report.json: the numbers of `lab.metrics.report` and what they were measured on."""
        self._write_json(REPORT, report)

    def write_predictions(self, content: bytes) -> None:
        """predictions.csv, as `lab.evaluation.Predictions.csv` makes it."""
        if self.writes:
            write_atomically(self.path / PREDICTIONS, lambda path: path.write_bytes(content))

    def add_epoch(self, *rows: Mapping[str, Any]) -> None:
        """Lines of history.jsonl."""
        self._append(HISTORY, rows)

    def add_steps(self, *rows: Mapping[str, Any]) -> None:
        """Lines of steps.jsonl."""
        self._append(STEPS, rows)

    def _write_config(self, settings: Mapping[str, Any]) -> None:
        if self.writes:
            self._write_json(CONFIG, {**settings, "versions": versions(), "commit": commit()})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.writes:
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(self.path / name, lambda path: path.write_text(text))

    def _cut(self, name: str, stays: Callable[[dict], bool]) -> None:
        """Keeps the lines up to the first that does not stay, or is no whole line."""
        path, kept = self.path / name, []
        with writing(path):
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                try:
                    if not line.endswith(b"\n") or not stays(json.loads(line)):
                        break
                except (ValueError, LookupError, TypeError):
                    break
                kept.append(line)
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(kept)))

    def _append(self, name: str, rows: Iterable[Any]) -> None:
        if self.writes:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            with writing(self.path / name), open(self.path / name, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(text) < len(text):  # the disk filled up: leave no part of a line
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start(config: TrainConfig, writes: bool) -> RunDir:
    """A new run's folder, made and locked by the process that `writes`; raises `UserError`."""
    if not writes:
        return RunDir("", writes=False)
    default_name = f"{config.model}-{config.dataset}".replace(":", "-")  # torchvision:NAME
    run = RunDir(create(config.output_dir, config.name, default_name, _replaces(config)))
    run.lock()
    return run


def require_name(config: TrainConfig) -> None:
    """Nothing; raises `UserError` where `start` would, as a run of that name is there."""
    if config.name:
        exists(Path(config.output_dir) / config.name, _replaces(config))


def _replaces(config: TrainConfig) -> bool:
    # A run that was killed before its first state is begun again.
    return config.overwrite or config.resume == "auto"


def evaluation_dir(
    weights: Path, part: str, output: str, writes: bool, tta: str = "none"
) -> RunDir:
    """The folder of an evaluation's files: `output`, or evaluate-`part` beside the weights.

    With test-time augmentation it is one beside that, whose name ends in -tta-`tta`.
    """
    path = Path(output) if output else weights.parent / f"evaluate-{part}"
    if tta != "none":
        path = Path(f"{os.path.abspath(path) if output else path}-tta-{tta}")
    if writes:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
    return RunDir(path, writes)


def create(output_dir: str, name: str, default_name: str, overwrite: bool) -> Path:
    """A new, empty run folder: OUTPUT_DIR/NAME, or the first free of DEFAULT, DEFAULT-2, ...

    Raises `UserError` where NAME exists and is not to be overwritten.
    """
    parent = Path(output_dir)
    if name and exists(parent / name, overwrite):
        path = parent / name
        replaced = RunDir(path)
        replaced.lock()  # nobody is at work there
        with writing(path):
            shutil.rmtree(path)
    number = 1
    while True:
        path = parent / (name or (default_name if number == 1 else f"{default_name}-{number}"))
        with writing(path):
            try:
                path.mkdir(parents=True)
                if os.name == "posix":
                    sync(parent)  # or a power cut might take the folder with all that is in it
                return path
            except FileExistsError:
                if name or not parent.is_dir():
                    raise
                number += 1


def exists(path: Path, overwrite: bool) -> bool:
    """Whether there is a run's folder to replace; `UserError` where it may not be replaced."""
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        return False
    if not overwrite:
        raise UserError(
            f"the run {path} exists", "Give another --name, or --overwrite to replace it"
        )
    if not is_run(path):
        raise UserError(f"{path} is not a run's folder", "Give another --name")
    return True


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, or empty: one that may be replaced."""
    try:
        if all(p.name == STATES for p in path.iterdir()):
            return True  # one that was begun, but for config.json, too
        return "lab" in json.loads((path / CONFIG).read_bytes())["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, which then takes the name `path`.

    Whenever the machine stops, `path` has the old content or the new.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            if os.name == "posix":  # the rename itself is on disk once its folder is
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when the disk has what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
