"""Runs that are killed at chosen moments and resumed until one finishes.

Its files must equal those of an uninterrupted run bit for bit. Used by test_kills.py and
benchmarks/soak.py.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from worlds import World, python, start, torchrun

SAME = (
    "best.safetensors", "report.json", "predictions.csv", "predictions.safetensors",
    "steps.jsonl", "images.safetensors",
)  # fmt: skip
CLOCK = ("train_seconds", "eval_seconds", "images_per_second")
MOMENTS = ("step", "save", "evaluation", "start-up", "best", "end")
LIMIT = 300  # seconds until a process must be ready or finished


@dataclass(frozen=True)
class Configuration:
    """The number of processes and the options of train.py."""

    name: str
    num_processes: int
    words: tuple[Any, ...]
    save_seconds: float = 0.002  # the time to write most of a checkpoint

    @property
    def checkpoint_every(self) -> int:
        """The number of steps between checkpoints."""
        return self.words[self.words.index("--checkpoint-every") + 1]


LENET5 = ("--dataset", "digits", "--recipe", "smoke", "--max-steps", 0, "--max-train-samples", 0,
          "--max-eval-samples", 0, "--val-fraction", 0.5, "--batch-size", 8, "--epochs", 6,
          "--augment", "crop", "--checkpoint-every", 5)  # fmt: skip
ALEXNET = ("--model", "alexnet", "--dataset", "digits", "--recipe", "smoke", "--max-steps", 0,
           "--max-train-samples", 90, "--batch-size", 12, "--epochs", 3,
           "--checkpoint-every", 2)  # fmt: skip
CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("LeNet-5", 1, LENET5),
        Configuration("LeNet-5, accumulate 2", 1, (*LENET5, "--grad-accum-steps", 2)),
        Configuration("LeNet-5, ema 0.9", 1, (*LENET5, "--ema-decay", 0.9)),
        Configuration("AlexNet, dropout", 1, ALEXNET, save_seconds=0.2),
        Configuration("LeNet-5, 2 processes", 2, LENET5),
        Configuration("AlexNet, dropout, 2 processes", 2, ALEXNET, save_seconds=0.2),
    )
}


@dataclass
class Kill:
    """One SIGKILL: when it was sent, and what it interrupted."""

    moment: str
    victim: str  # "all" or "one worker"
    step: int = 0  # the last step in steps.jsonl
    during: str = ""
    has_temporary: bool = False  # an incomplete checkpoint, .step-*, was left
    resumed_from: int | None = None  # step; 0 if restarted; None if killed before it was printed


@dataclass
class Reference:
    """An uninterrupted run."""

    folder: Path
    steps: list[int] = field(default_factory=list)  # the last step of each epoch
    startup_seconds: float = 0.0  # until the first step was written


def command(configuration: Configuration, folder: Path) -> list[str]:
    words = ("train.py", *configuration.words, "--threads", 1, "--log-every", 1)
    words += ("--resume", "auto", "--output-dir", folder.parent, "--name", folder.name)
    many = configuration.num_processes > 1
    return torchrun(configuration.num_processes, *words) if many else python(*words)


def rows(path: Path) -> list[dict]:
    """Return the complete lines of a file, without durations."""
    content = path.read_bytes() if path.exists() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def last_step(folder: Path) -> int:
    """Return the last step in steps.jsonl, reading only the end of the file."""
    try:
        with open(folder / "steps.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 400))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def run_uninterrupted(configuration: Configuration, folder: Path) -> Reference:
    """Train without a kill."""
    start_time = time.monotonic()
    with start(command(configuration, folder)) as world:
        world.until(lambda: last_step(folder) > 0, LIMIT)
        startup = time.monotonic() - start_time
        ended = world.wait(LIMIT)
    assert ended.code == 0, ended.stderr
    last = {row["epoch"]: row["step"] for row in rows(folder / "steps.jsonl")}
    return Reference(folder, list(last.values()), startup)


def survive(
    configuration: Configuration,
    reference: Reference,
    folder: Path,
    moments: list[tuple[str, str]],
    seed: int,
) -> list[Kill]:
    """Train in `folder`, killed at each of `moments` (moment, victim) in turn; return the kills.

    A run that finishes before the moment is not started again. Assert that its files equal the
    reference's and that no more steps were repeated than expected.
    """
    choose, kills = random.Random(seed), []
    total = reference.steps[-1]
    for i in range(len(moments) + 1):
        before = leftovers(folder)
        with start(command(configuration, folder), {"PYTHONUNBUFFERED": "1"}) as world:
            if i < len(moments):
                # Later from kill to kill, so that the run finishes.
                target = int(total * (i + choose.random()) / (len(moments) + 0.5))
                new = Kill(*moments[i])
                strike = killer(new, configuration, reference, folder, target, choose)
                if strike(world):
                    kills.append(new)
            ended = world.wait(LIMIT)
        finished = " is finished; " in ended.stdout  # it was killed after its last file was written
        resumed = last_step(folder) if finished else resumed_from(ended.stdout)
        for kill in kills[:i]:  # a run may be killed before it prints this
            if kill.resumed_from is None:
                kill.resumed_from = resumed
        assert "Traceback" not in ended.stderr or len(kills) > i, ended.stderr
        if len(kills) <= i:
            assert ended.code == 0, ended.stderr
            break
        assert ended.code != 0
        assert ended.left_behind == []
        temporary = leftovers(folder) - before
        kills[i].step = last_step(folder)
        kills[i].has_temporary = any(name.startswith("checkpoints/.step-") for name in temporary)
        kills[i].during = during(folder, reference, temporary, resumed)
    for kill in kills:  # while a checkpoint is written, the one before it is complete
        assert 0 <= kill.step - kill.resumed_from <= 2 * configuration.checkpoint_every, kill
    compare(folder, reference.folder)
    return kills


def killer(
    kill: Kill,
    configuration: Configuration,
    reference: Reference,
    folder: Path,
    target: int,
    choose: random.Random,
) -> Callable[[World], bool]:
    """Return a function that kills at the moment, or returns False if the run finished before."""
    moment, victim = kill.moment, kill.victim
    delays = {
        "step": 0.1,
        "save": configuration.save_seconds,
        "evaluation": 0.05,
        "start-up": reference.startup_seconds * 0.7,  # later starts are faster
        "best": 0.01,
        "end": 0.1,
    }
    delay = choose.uniform(0, delays[moment])

    def ready() -> bool:
        step = last_step(folder)
        if moment == "evaluation":
            return step >= next(end for end in reference.steps if end >= target)
        if moment == "end":
            return len(rows(folder / "history.jsonl")) == len(reference.steps)
        if moment == "save":
            return step >= target and any((folder / "checkpoints").glob(".step-*"))
        if moment == "best":  # at the latest two epochs later, as not every epoch improves
            due = step >= target and any(folder.glob(".best.*"))
            return due or step >= target + 2 * reference.steps[0]
        return step >= target

    def waited(until: Callable[[], bool], world: World) -> bool:
        while not until():
            if world.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True

    def strike(world: World) -> bool:
        # Until the settings are printed, the lines are those of the previous process.
        if moment != "start-up" and not waited(
            lambda: b"  device  " in world.stdout.read_bytes(), world
        ):
            return False
        victims = processes(world)  # now, because listing them takes longer than a save
        if moment != "start-up" and not waited(ready, world):
            return False
        time.sleep(delay)
        if moment == "start-up":
            victims = processes(world)
        if victim == "one worker" and len(victims) > 1:
            victims = [choose.choice(victims[:-1])]
        if world.process.poll() is not None:
            return False
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return True

    return strike


def processes(world: World) -> list[psutil.Process]:
    """Return the processes of a run, the launcher (or the only process) last."""
    launcher = psutil.Process(world.process.pid)
    return [*launcher.children(recursive=True), launcher]


def resumed_from(stdout: str) -> int | None:
    lines = [line for line in stdout.splitlines() if line.startswith("resuming from ")]
    if lines:
        return int(lines[-1].rsplit("-", 1)[1])
    return 0 if "\n  device  " in stdout else None


def leftovers(folder: Path) -> set[str]:
    """Return the temporary files and directories that killed processes left."""
    paths = {*folder.glob(".*"), *(folder / "checkpoints").glob(".step-*")}
    return {str(path.relative_to(folder)) for path in paths}


def during(folder: Path, reference: Reference, temporary: set[str], resumed: int | None) -> str:
    """Return what the kill interrupted, as far as the files show it."""
    for name in sorted(temporary, reverse=True):
        if name.startswith("checkpoints/.step-"):
            return "saving a checkpoint" if name.count(".") > 1 else "removing a checkpoint"
    for name in temporary:
        return f"writing {name.split('.', 1)[1].rsplit('.', 2)[0]}"
    step = last_step(folder)
    if resumed is None or step <= resumed:
        return "start-up"
    num_epochs = len(rows(folder / "history.jsonl"))
    if num_epochs == len(reference.steps):
        return "test split and report"
    return "evaluation" if step in reference.steps[num_epochs:] else "a step"


def compare(folder: Path, reference: Path) -> None:
    """Assert that the files of two runs are equal except for durations."""
    for name in SAME:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert rows(folder / "history.jsonl") == rows(reference / "history.jsonl")
    names = [sorted(p.name for p in f.rglob("*") if p.name != ".lock") for f in (folder, reference)]
    assert names[0] == names[1]
