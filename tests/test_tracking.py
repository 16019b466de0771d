"""Trackers: TensorBoard's files read back; a tracker that fails or hangs does nothing to a run."""

import json
import threading
import time
import tomllib
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from resuming import LENET, cut_off, read_lines, resume, start

import train
from lab import report, tracking
from lab.config import TRACKERS
from lab.rundir import RunDir
from lab.tracking import Tracking

EPOCH = ("train_loss", "val_loss", "val_accuracy", "val_macro_f1", "learning_rate")


class Told(GeneralTracker):
    """Stands for a service: keeps what it is told, by the key that the run gave it."""

    name, requires_logging_directory = "told", False
    calls: list = []  # noqa: RUF012 - of all instances

    def __init__(self, *names, **settings):
        self.settings = settings

    @property
    def tracker(self):
        return self

    def start(self):
        self.calls.append(("start", self.settings))

    def store_init_configuration(self, values):
        self.calls.append(("settings", values))

    def log(self, values, step=None, **_):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finish", None))


@pytest.fixture
def told(monkeypatch):
    """The calls that a stand-in for W&B has had."""
    monkeypatch.setattr(Told, "calls", [])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Told)
    return Told.calls


def numbers(folder):
    """name -> [(step, value)] of an event file's folder, as TensorBoard reads it."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in tags["scalars"]}
    return found | {name: [e.step for e in events.Images(name)] for name in tags["images"]}


def test_a_killed_and_resumed_run_has_one_log_with_nothing_twice(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    # It dies in its third epoch, with a log that nobody ends, and goes on from the second's end,
    # which has been told of before: the state was written before the epoch was evaluated.
    words = [*LENET, "--tracker", "tensorboard"]
    cut_off(monkeypatch, 9, lambda: start(tmp_path, *words))
    end = time.monotonic() + 20
    while len(before := numbers(run / "tensorboard").get("steps/loss", ())) < 9:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [step for step, _ in before] == list(range(1, 10))

    monkeypatch.setenv(report.SWITCH, "1")
    resume(run)
    found = numbers(run / "tensorboard")
    for name in ("loss", "learning_rate"):
        rows = [(row["step"], pytest.approx(row[name])) for row in read_lines(run / "steps.jsonl")]
        assert found[f"steps/{name}"] == rows
        assert len(rows) == 12
    history = read_lines(run / "history.jsonl")
    for name in EPOCH:
        rows = [(4 * row["epoch"], pytest.approx(row[name])) for row in history]
        assert found[f"epochs/{name}"] == rows
    scores = json.loads((run / "report.json").read_text())
    for name in ("accuracy", "macro_f1", "loss", "num_samples"):
        assert found[f"test/{name}"] == [(12, pytest.approx(scores[name]))]
    assert found["plots/confusion_matrix"] == [12]
    # Settings are told once.
    assert len(list((run / "tensorboard").glob("*/hparams.yml"))) == 1


def make_run(tmp_path, **settings):
    run = RunDir(tmp_path)
    run.add_steps({"step": 3, "epoch": 1, "loss": 0.5, "learning_rate": 0.1})
    return run, {"lr": 0.1, "versions": {"torch": "2"}, "selected_on": "validation", **settings}


def test_a_log_is_begun_once_and_gone_on_with_by_the_same_key(tmp_path, told):
    run, settings = make_run(tmp_path, tracker="wandb")
    with Tracking(run, settings, 0) as tracked:
        tracked.step({"step": 1, "epoch": 1, "loss": None, "learning_rate": 0.1})  # skipped
        tracked.epoch({"epoch": 1, "val_loss": 2.0}, 3)
        tracked.finish()
    with Tracking(run, settings, 3) as tracked:
        tracked.finish({"split": "test", "accuracy": 0.75, "per_class": []}, 5)
    starts = [settings for kind, settings in told if kind == "start"]
    assert len({s["id"] for s in starts}) == 1
    assert [s["resume"] for s in starts] == ["allow", "allow"]
    assert [call for call in told if call[0] != "start"] == [
        ("settings", {"lr": 0.1, "tracker": "wandb", "selected_on": "validation"}),
        (1, {"steps/learning_rate": 0.1}),
        (3, {"epochs/epoch": 1, "epochs/val_loss": 2.0}),
        ("finish", None),
        (3, {"steps/loss": 0.5, "steps/learning_rate": 0.1}),  # of the state's last step
        (5, {"test/accuracy": 0.75}),
        ("finish", None),
    ]
    # Damaged, it is not trusted: another log is begun.
    (tmp_path / "trackers.json").write_text('{"key": "../x", "known": ["wandb"]}')
    Tracking(run, settings, 3).finish()
    *_, last = [settings for kind, settings in told if kind == "start"]
    assert last["id"] not in ("../x", starts[0]["id"])


def test_only_the_main_process_tells(tmp_path, told):
    run, settings = make_run(tmp_path, tracker="wandb")
    run.writes = False
    with Tracking(run, settings, 0) as tracked:
        tracked.epoch({"epoch": 1}, 3)
        tracked.finish({"accuracy": 1.0}, 3)
    assert told == []
    assert not (tmp_path / "trackers.json").exists()


def test_steps_that_a_tracker_has_are_not_told_again():
    service = Told()
    service.calls = []
    log = tracking._Log(service, {"steps/loss": 5})
    log.numbers({"steps/loss": 1.0}, 5)
    log.numbers({"steps/loss": 1.0, "epochs/val_loss": 2.0}, 5)
    log.numbers({"steps/loss": 3.0}, 6)
    assert service.calls == [(5, {"epochs/val_loss": 2.0}), (6, {"steps/loss": 3.0})]


@pytest.mark.parametrize("failing", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path, told, monkeypatch, capfd, failing
):
    class Broken(Told):
        pass

    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(Broken, "calls", [])
    monkeypatch.setattr(Broken, failing, fail)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    run, settings = make_run(tmp_path, tracker="tensorboard,wandb")
    with Tracking(run, settings, 0) as tracked:
        for step in (1, 2, 3):
            tracked.epoch({"epoch": step}, step)
        tracked.finish()
    assert [call[0] for call in told] == ["start", "settings", 1, 2, 3, "finish"]
    assert capfd.readouterr().err == (
        "warning: tensorboard failed, and the run goes on without it "
        "(ConnectionError: no network)\n"
    )


def test_a_tracker_that_hangs_holds_up_no_step_and_no_end(tmp_path, told, monkeypatch, capfd):
    network = threading.Event()
    monkeypatch.setattr(Told, "log", lambda *_, **__: network.wait(60))
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    run, settings = make_run(tmp_path, tracker="wandb")
    begun = time.monotonic()
    with Tracking(run, settings, 0) as tracked:
        tracked.epoch({"epoch": 1}, 1)
        tracked.finish()
    assert time.monotonic() - begun < 20
    network.set()
    assert capfd.readouterr().err.count("wandb has not taken all that it was told") == 1


def test_every_name_is_one_of_accelerates_and_has_an_extra():
    assert set(TRACKERS) <= LOGGER_TYPE_TO_CLASS.keys()
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert {name: extras[name] for name in TRACKERS} == {name: [name] for name in TRACKERS}


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "--tracker has no tensorbord. Choose from tensorboard, wandb, mlflow, "
                       "trackio, or none."),
        ("wandb,wandb", "--tracker wandb,wandb repeats a name. Name each once."),
        ("mlflow", "--tracker mlflow needs the package mlflow. "
                   "Run pip install -e '.[mlflow]' in lab's checkout."),
    ],
)  # fmt: skip
def test_p7_a_tracker_that_is_not_there(fails, monkeypatch, tracker, message):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    words = ["--dataset", "digits", "--threads", "1", "--tracker", tracker]
    assert fails(train, *words) == message
