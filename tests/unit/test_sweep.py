"""sweep.py: choosing settings on the validation split, pruning, interruptions, and errors."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy
import yaml
from handmade import predicted, splits
from worlds import ROOT, Fork, python, start

import sweep
from lab.checkpoint.run_dir import CARD, CONFIG, HISTORY, RunDir
from lab.config.cli import parse_arguments
from lab.config.recipes import resolve
from lab.config.schema import TrainConfig
from lab.config.sweep import Range, read_sweep
from lab.report import sweep as page
from lab.report.plots import new_figure

optuna = pytest.importorskip("optuna", reason="needs the extra sweep")

SETTINGS = """
dataset: digits
epochs: 4
warmup_epochs: 0
lr: {low: 0.001, high: 0.1, log: true}
"""
NAMES = ("cat", "dog")
ROW = {"train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 1.0, "val_macro_f1": 0.5,
       "learning_rate": 0.1, "train_seconds": 1.0, "eval_seconds": 1.0,
       "images_per_second": 1.0}  # fmt: skip


class Killed(BaseException):
    """Stands for the death of the sweep: nothing in it catches this."""


class FakeRun:
    """A process of train.py that trains an epoch whenever it is polled.

    Its validation accuracy increases with the learning rate, its test accuracy decreases.
    """

    started: list["FakeRun"] = []  # noqa: RUF012
    failing: tuple[str, ...] = ()  # names of runs that fail after an epoch
    die_in = ""  # name of the run during which the sweep dies

    def __init__(self, words, log, env):
        config = parse_arguments(TrainConfig, words[1:], prog="train.py", description="")
        self.config, self.env, self.log, self.code = resolve(config), env, log, None
        self.run = RunDir(Path(self.config.output_dir) / self.config.name)
        self.first = len(sweep.read_history(self.run.path))
        self.started.append(self)
        log.write_text("")
        if not self.first:
            self.run.path.mkdir()
            device = {"device": "cpu", "world_size": 1, "precision": "no"}
            self.run.create(asdict(self.config) | device)

    def poll(self):
        epoch = len(sweep.read_history(self.run.path)) + 1
        if self.code is None and epoch <= self.config.epochs:
            value = self.config.lr * (1 - 0.1 * abs(epoch - 3))  # the best epoch is 3
            self.run.add_epoch({"epoch": epoch, "val_accuracy": value, **ROW})
            if self.run.path.name in self.failing:
                self.log.write_text("error: the loss is not finite. Lower it.\n")
                self.code = 2
            if self.run.path.name == self.die_in:
                raise Killed
        elif self.code is None:
            predictions = predicted(splits(NAMES, 20).test)
            report = predictions.report() | {"accuracy": 1 - self.config.lr, "best_epoch": 3}
            self.run.write_report({"selection_split": "validation", **report})
            self.run.write_predictions(predictions.csv(), predictions.safetensors())
            (self.run.path / CARD).touch()
            self.code = 0
        return self.code

    def send_signal(self, number):
        self.code = 128 + number

    def wait(self):
        pass


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replace train.py by `FakeRun`, in an empty directory with a sweep's file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FakeRun, "started", [])
    monkeypatch.setattr(sweep, "start_process", FakeRun)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0)
    monkeypatch.setattr(sweep, "environments", lambda: [{}])
    monkeypatch.setattr(page, "parallel_coordinates", lambda *_: new_figure(1, 1))
    Path("s.yaml").write_text(SETTINGS)
    return FakeRun


def call(*words):
    sweep.main(["s.yaml", "--quiet", *map(str, words)])


def study():
    return optuna.load_study(study_name="sweep", storage="sqlite:///sweeps/s/sweep.db")


def names(fake):
    return [process.run.path.name for process in fake.started]


def test_p6_the_best_settings_are_selected_on_the_validation_split(fake):
    call("--trials", 8, "--seeds", 2, "--pruner", "none")
    trials = fake.started[:8]
    assert names(fake)[:8] == [f"trial-{i}" for i in range(1, 9)]
    rates = [process.config.lr for process in trials]
    assert len(set(rates)) == 8
    assert all(0.001 <= rate <= 0.1 for rate in rates)
    best = max(trials, key=lambda process: process.config.lr)  # the lowest test accuracy
    for seed, repeated in zip((43, 44), fake.started[8:], strict=True):
        assert repeated.run.path.name == f"{best.run.path.name}-seed-{seed}"
        assert (repeated.config.lr, repeated.config.seed) == (best.config.lr, seed)
    values = [trial.value for trial in study().trials]
    assert values == pytest.approx(rates)  # the validation accuracy of the best epoch
    text = Path("sweeps/s/report.html").read_text()
    assert f"Best settings: {best.run.path.name}<" in text
    assert f"{best.config.lr:.4f}" in text
    for process in trials:  # their test accuracy is not shown
        assert (f"{1 - process.config.lr:.4f}" in text) == (process is best)
    assert "https:" not in text
    file = f"sweeps/s/{best.run.path.name}.yaml"
    settings = parse_arguments(TrainConfig, ["--config", file], prog="", description="")
    assert settings == yaml.safe_load(SETTINGS) | {"lr": best.config.lr, "warmup_epochs": 0.0}


def test_p6_pruning_sees_the_validation_split_only(fake):
    """Trials with low rates are stopped, though they have the highest test accuracy."""
    call("--trials", 15, "--seeds", 0)
    states = {t.user_attrs["run"]: t.state.name for t in study().trials}
    rates = {process.run.path.name: process.config.lr for process in fake.started}
    stopped = [name for name, state in states.items() if state == "PRUNED"]
    assert stopped
    complete = sorted(rates[name] for name, state in states.items() if state == "COMPLETE")
    for name in stopped:
        assert rates[name] < complete[len(complete) // 2]
        epochs = sweep.read_history(Path("sweeps/s", name))
        assert 1 < len(epochs) < 4
    assert not {"trial-1", "trial-2", "trial-3", "trial-4", "trial-5"} & {*stopped}
    # Validation values in the order of the epochs, and nothing else, were reported.
    for trial in study().trials:
        rows = sweep.read_history(Path("sweeps/s", trial.user_attrs["run"]))
        assert trial.intermediate_values == {row["epoch"]: row["val_accuracy"] for row in rows}


def test_p3_a_sweep_that_was_killed_resumes_its_run(fake, monkeypatch):
    monkeypatch.setattr(fake, "die_in", "trial-3")
    monkeypatch.setattr(fake, "send_signal", lambda *_: None)
    with pytest.raises(Killed):
        call("--trials", 4, "--seeds", 1)
    assert len(sweep.read_history(Path("sweeps/s/trial-3"))) == 1
    killed = fake.started[-1]
    monkeypatch.setattr(fake, "die_in", "")
    call("--trials", 4, "--seeds", 1)
    resumed, *rest = fake.started[3:]
    assert resumed.run.path.name == "trial-3"
    assert resumed.first == 1  # its first epoch is not trained again
    assert resumed.config == killed.config
    assert names(fake)[3:5] == ["trial-3", "trial-4"]
    assert len({process.config.lr for process in fake.started[:3] + rest[:1]}) == 4
    assert len(sweep.last_trials(study())) == 4
    num_started = len(fake.started)
    call("--trials", 4, "--seeds", 1)  # it is finished: nothing is trained
    assert len(fake.started) == num_started
    call("--trials", 5, "--seeds", 0)
    assert names(fake)[num_started:] == ["trial-5"]


def test_a_failed_trial_does_not_end_the_sweep(fake, monkeypatch, capsys):
    monkeypatch.setattr(fake, "failing", ("trial-1", "trial-3"))
    call("--trials", 4, "--seeds", 0)
    assert [t.state.name for t in study().trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert "warning: trial-3 failed (exit code 2): the loss is not finite. Lower it." in (
        capsys.readouterr().err
    )


def test_a_combination_that_cannot_start_does_not_end_the_sweep(fake, monkeypatch):
    """Some settings, such as the image size, are checked when the model is built."""
    original = fake.poll

    def poll(process):
        if process.run.path.name != "trial-2":
            return original(process)
        (process.run.path / CONFIG).unlink(missing_ok=True)
        process.log.write_text("error: lenet5 cannot take images of 20 pixels.\n")
        return 2

    monkeypatch.setattr(fake, "poll", poll)
    call("--trials", 3, "--seeds", 0)
    assert [t.state.name for t in study().trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_the_complete_lines_of_a_history_with_a_metric_are_reported(tmp_path):
    assert sweep.read_history(tmp_path) == []
    file = tmp_path / HISTORY
    file.write_text('{"epoch": 1, "val_loss": null}\n{"epoch": 2, "val_loss": 0.5}\n{"epo')
    reported = []
    trial = SimpleNamespace(report=lambda *row: reported.append(row), should_prune=lambda: False)
    job = sweep.Job(tmp_path, {}, "val_loss", trial=trial)
    job.report()
    job.report()
    assert reported == [(0.5, 2)]


def test_the_heights_on_an_axis_of_the_page():
    assert page.scale([1.0, 10.0, 100.0], log=True)[0] == pytest.approx([0, 0.5, 1])
    assert page.scale([0.0, 1.0, 4.0], log=False)[0] == [0, 0.25, 1]
    assert page.scale([2, 2], log=False) == ([0.5, 0.5], [(0.5, "2")])
    choices = ([0.5, 0, 1], [(0, "a"), (0.5, "b"), (1, "c")])
    assert page.scale(["b", "a", "c"], log=False) == choices


def test_each_gpu_trains_one_run_at_a_time(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1")
    gpus = sweep_environments()
    assert [env["CUDA_VISIBLE_DEVICES"] for env in gpus] == ["4", "GPU-1"]
    monkeypatch.setattr("lab.distributed.num_cores", lambda: 6)  # of the process, not the machine
    assert [env["OMP_NUM_THREADS"] for env in sweep_environments()] == ["3", "3"]
    monkeypatch.setattr(sweep, "environments", lambda: gpus.copy())
    most, original = [], fake.poll

    def poll(process):
        most.append([p.env["CUDA_VISIBLE_DEVICES"] for p in fake.started if p.code is None])
        return original(process)

    monkeypatch.setattr(fake, "poll", poll)
    call("--trials", 5, "--seeds", 0, "--pruner", "none")
    assert ["4", "GPU-1"] in map(sorted, most)
    assert all(len(set(running)) == len(running) for running in most)
    assert len(fake.started) == 5


sweep_environments = sweep.environments


def test_ranges_and_choices_have_the_type_of_the_setting(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(
        "dataset: digits\nlr: {low: 1e-3, high: 1, log: true}\nbatch_size: {low: 8, high: 64}\n"
        "augment: [none, crop]\nmixed_precision: no\nlabel_smoothing: [0, 0.1]\n"
    )
    fixed, searched, first = read_sweep(file)
    assert fixed == {"dataset": "digits", "mixed_precision": "no"}
    assert searched == {"lr": Range(0.001, 1.0, True), "batch_size": Range(8, 64),
                        "augment": ["none", "crop"], "label_smoothing": [0.0, 0.1]}  # fmt: skip
    assert (first.lr, first.batch_size, first.augment) == (0.001, 8, "none")
    kinds = [type(sweep.distribution(values)).__name__ for values in searched.values()]
    assert kinds == ["FloatDistribution", "IntDistribution", *["CategoricalDistribution"] * 2]


OF_TEST = "a sweep must not select settings on the test split, and val_fraction is 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [0.1, 0.2]\nepoch: 3", "unknown setting epoch in s.yaml. Did you mean epochs"),
        ("lr: [0.1, fast]", "invalid lr 'fast' in s.yaml: expected a number."),
        ("lr: [0.1]", "invalid lr [0.1] in s.yaml: expected two or more different choices."),
        ("lr: {low: 1, high: 0.1}", "invalid lr {'low': 1, 'high': 0.1} in s.yaml: expected low <"),
        ("lr: {low: 0, high: 0.1}", "invalid --lr 0.0: expected more than 0."),
        ("lr: {low: 0, high: 1, log: true}", "invalid lr {'low': 0, 'high': 1, 'log': True} in s."),
        ("lr: {min: 0, max: 1}", "invalid lr {'min': 0, 'max': 1} in s.yaml: expected {low: NUM"),
        ("augment: {low: a, high: b}", "invalid augment {'low': 'a', 'high': 'b'} in s.yaml: exp"),
        ("optimizer: [sgd, adm]", "invalid --optimizer 'adm': expected one of sgd, nesterov, "),
        ("lr: 0.1", "s.yaml has no setting to search. Write a list of choices, lr: [0.1, 0.01],"),
        ("lr: [", "s.yaml is not valid YAML (*). Correct the file."),
        ("lr: [0.1, 0.2]\nname: x", "s.yaml contains name, which a sweep does not accept. Le"),
        ("lr: [0.1, 0.2]\nmax_hours: 1", "s.yaml contains max_hours, which a sweep does not "),
        ("val_fraction: [0.1, 0.2]", "s.yaml searches val_fraction, which cannot be searched. Giv"),
        ("seed: [1, 2]", "s.yaml searches seed, which cannot be searched. Give one value."),
        ("quiet: [true, false]", "s.yaml searches quiet, which cannot be searched. Give one value"),
        ("lr: [0.1, 0.2]\nrecipe: notebook", OF_TEST),
        ("lr: [0.1, 0.2]\nrecipe: smokes", "unknown recipe smokes. Did you mean smoke?"),
        ("lr: [0.1, 0.2]\nmodel: lenet", "unknown model lenet. Did you mean lenet5"),
        ("model: [lenet5, alexnet]", "model alexnet changes the default dataset. Write dataset in"),
        ("model: [lenet5, alexnot]\ndataset: digits", "unknown model alexnot. Did you mean alexne"),
        ("lr: [0.1, 0.2]\nmodel: x.py:net", "s.yaml contains x.py:net, and code that a file name"),
        ("lr: [0.1, 0.2]\ndataset: digit", "unknown dataset digit. Did you mean digits?"),
    ],
)  # fmt: skip
def test_p7_mistakes_in_the_file_are_one_line(fails, tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    printed = fails(sweep, "s.yaml")
    beginning, _, end = message.partition("(*)")
    assert printed.startswith(beginning)
    assert end in printed


def test_p7_other_mistakes_are_one_line(fails, tmp_path, monkeypatch):
    assert fails(sweep, "s.yaml") == (
        "cannot read s.yaml (No such file or directory). Give a YAML file of settings."
    )
    (tmp_path / "s.yaml").write_text(SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "find_spec", lambda _: None)
        assert fails(sweep, "s.yaml") == (
            "sweep.py needs optuna. Run pip install -e '.[sweep]' in lab's checkout."
        )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="starts the runs itself, one per GPU"):
        sweep.main(["s.yaml"])


def test_p7_a_sweep_of_other_settings_is_not_continued(fake):
    call("--trials", 1, "--seeds", 0)
    Path("s.yaml").write_text(SETTINGS + "batch_size: 64\n")
    with pytest.raises(
        ValueError, match=r"^sweeps/s has a sweep of other settings than s\.yaml\. G"
    ):
        call()
    assert len(fake.started) == 1


@pytest.mark.parametrize("name", ["x", "a%20{b}?#c"])
def test_p7_a_damaged_database_is_one_line(fails, tmp_path, name):
    (tmp_path / "s.yaml").write_text(SETTINGS)
    (tmp_path / name).mkdir()
    (tmp_path / name / "sweep.db").write_text("not a database")
    assert fails(sweep, "s.yaml", "--output", name, leaves=(f"{name}/.lock",)) == (
        f"cannot use the database {name}/sweep.db (file is not a database). "
        "Free some space, or start again with another --output."
    )


def test_p7_a_locked_database_is_one_line(fake, monkeypatch):
    def fail(*_, **__):
        try:
            raise sqlalchemy.exc.OperationalError("statement", {}, Exception("database is locked"))
        except sqlalchemy.exc.OperationalError as error:
            raise optuna.exceptions.StorageInternalError("An exception is raised") from error

    monkeypatch.setattr(optuna.Study, "tell", fail)
    with pytest.raises(ValueError, match=r"sweep\.db \(database is locked\)\. Free some space"):
        call("--trials", 1, "--seeds", 0)


def test_p7_a_run_that_cannot_start_ends_the_sweep(fails, tmp_path, monkeypatch):
    def start_process(words, log, env):
        log.touch()
        env = os.environ | env | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        return Fork(words, env, log.absolute(), log.absolute())

    monkeypatch.setattr(sweep, "start_process", start_process)
    (tmp_path / "s.yaml").write_text("dataset: ./missing\nmodel: lenet5\nlr: [0.1, 0.2]\n")
    message = fails(sweep, "s.yaml", "--output", tmp_path / "out", leaves=("out",))
    assert message.startswith("trial-1 failed (exit code 2): there is no directory ")
    assert message.endswith(f"See {tmp_path}/out/trial-1.log.")


@pytest.mark.slow
def test_p3_a_killed_and_a_stopped_sweep_continue(tmp_path):
    """With real runs: SIGKILL of all processes, then SIGTERM of the sweep alone."""
    file, directory = tmp_path / "s.yaml", tmp_path / "sweep"
    file.write_text(
        "dataset: digits\nrecipe: smoke\nmax_steps: 0\nepochs: 20\nthreads: 1\n"
        "checkpoint_every: 2\nlr: {low: 0.001, high: 0.003}\n"
    )
    words = ["sweep.py", file, "--trials", 1, "--seeds", 0, "--output", directory, "--quiet"]
    run = RunDir(directory / "trial-1")

    def epochs():
        return len(sweep.read_history(run.path))

    with start(python(*words)) as world:
        world.until(lambda: epochs() > 1 and run.checkpoints, 200)
    first = (run.path / "history.jsonl").read_text().splitlines()[0]
    with start(python(*words)) as world:
        world.until(lambda: "resuming from" in log(run) or epochs() > 6, 200)
        num_epochs = epochs()
        world.until(lambda: epochs() > num_epochs, 200)
        world.process.send_signal(signal.SIGTERM)
        ended = world.wait(100)
        assert ended.left_behind == []
    assert ended.code == 128 + signal.SIGTERM
    assert "warning: stopping 1 runs, which the same command resumes" in ended.stderr
    assert not run.is_finished
    with start(python(*words)) as world:
        ended = world.wait(200)
    assert ended.code == 0, ended.stderr
    assert run.is_finished
    assert epochs() == 20
    assert (run.path / "history.jsonl").read_text().splitlines()[0] == first
    assert json.loads((run.path / "config.json").read_text())["lr"] < 0.003
    assert (directory / "report.html").exists()


def log(run):
    file = run.path.with_name(f"{run.path.name}.log")
    return file.read_text() if file.exists() else ""
