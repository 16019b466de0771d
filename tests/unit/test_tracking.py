"""Trackers: TensorBoard's files read back; a tracker that fails does not end a run."""

import json

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from mistakes import make_picture
from resuming import LENET, cut_off, read_lines, resume, start

import train
from lab import loggers as loggers_module
from lab.checkpoint.run_dir import RunDir
from lab.loggers import Loggers

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

    def log_images(self, values, step=None, **_):
        self.calls.append(("images", list(values)))

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
    before = numbers(run / "tensorboard")["steps/loss"]
    assert [step for step, _ in before] == list(range(1, 10))

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
    # Every event file is in one directory: a second one would be a second, empty run.
    assert {path.parent for path in run.rglob("*tfevents*")} == {run / "tensorboard"}
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["checkpoints", "tensorboard"]


def test_an_interrupted_run_ends_its_log(tmp_path, monkeypatch, told):
    monkeypatch.setattr(loggers_module, "check_packages", lambda *_, **__: None)
    start(tmp_path, *LENET, "--tracker", "wandb", "--max-hours", "1e-9")
    [settings] = [values for kind, values in told if kind == "settings"]
    assert settings["selection_split"] == "validation"
    assert told[-1] == ("finish", None)


STEP = {"step": 3, "epoch": 1, "loss": 0.5, "learning_rate": 0.1}


def make_run(tmp_path, **settings):
    run = RunDir(tmp_path)
    run.add_steps(STEP)
    return run, {"lr": 0.1, "versions": {"torch": "2"}, "selection_split": "validation", **settings}


def test_a_resumed_run_goes_on_with_the_same_log(tmp_path, told):
    run, settings = make_run(tmp_path, tracker="wandb")
    with Loggers(run, settings, 0) as loggers:
        loggers.step({"step": 1, "epoch": 1, "loss": None, "learning_rate": 0.1})  # skipped
        run.add_steps(STEP)
        loggers.epoch({"epoch": 1, "val_loss": 2.0}, 3)
        loggers.finish()
    with Loggers(run, settings, 3) as loggers:
        loggers.finish({"split": "test", "accuracy": 0.75, "per_class": []}, 5)
    starts = [settings for kind, settings in told if kind == "start"]
    assert len({s["id"] for s in starts}) == 1
    assert [s["resume"] for s in starts] == ["allow", "allow"]
    configured = ("settings", {"lr": 0.1, "tracker": "wandb", "selection_split": "validation"})
    assert [call for call in told if call[0] != "start"] == [
        configured,
        (1, {"steps/learning_rate": 0.1}),
        (3, {"epochs/epoch": 1, "epochs/val_loss": 2.0}),
        ("finish", None),
        configured,
        (3, {"steps/loss": 0.5, "steps/learning_rate": 0.1}),  # of the checkpoint's last step
        (5, {"test/accuracy": 0.75}),
        ("finish", None),
    ]
    # Other processes may be on a machine that has no file of the run.
    Loggers(RunDir(tmp_path / "elsewhere", is_main_process=False), settings, 3).finish()
    # A damaged id is not used: another log is begun.
    (tmp_path / "trackers.json").write_text('{"wandb_id": "../x"}')
    Loggers(run, settings, 3).finish()
    *_, last = [settings for kind, settings in told if kind == "start"]
    assert last["id"] not in ("../x", starts[0]["id"])


def test_only_the_main_process_tells(tmp_path, told):
    run, settings = make_run(tmp_path, tracker="wandb")
    run.is_main_process = False
    with Loggers(run, settings, 0) as loggers:
        loggers.epoch({"epoch": 1}, 3)
        loggers.finish({"accuracy": 1.0}, 3)
    assert told == []
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize("failing", ["start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_costs_one_warning_and_the_others_go_on(
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
    make_picture(tmp_path / "plots" / "curves.png")
    with Loggers(run, settings, 0) as loggers:
        for step in (1, 2, 3):
            loggers.epoch({"epoch": step}, step)
        loggers.finish({"accuracy": 1.0}, 4)
    expected = ["start", "settings", 1, 2, 3, 4, "images", "finish"]
    assert [call[0] for call in told] == expected
    assert capfd.readouterr().err == (
        "warning: --tracker tensorboard failed; the run continues without it "
        "(ConnectionError: no network)\n"
    )


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "invalid --tracker 'tensorbord': expected none or a comma-separated list of "
            "tensorboard, wandb."),

        ("wandb", "--tracker wandb needs the package wandb. "
                  "Run pip install -e '.[wandb]' in lab's checkout."),
    ],
)  # fmt: skip
def test_p7_a_tracker_that_is_not_there(fails, monkeypatch, tracker, message):
    monkeypatch.setattr(loggers_module, "find_spec", lambda _: None)
    words = ["--dataset", "digits", "--threads", "1", "--tracker", tracker]
    assert fails(train, *words) == message
