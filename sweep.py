"""Search for the best settings of train.py, by a metric on the validation split, with Optuna.

  python sweep.py lenet5.yaml                 20 trials, then 3 more seeds of the best settings
  python sweep.py lenet5.yaml --trials 100    continue the same sweep

The file has settings of train.py: a value, a list of choices to search, or a range to search:

  dataset: digits
  epochs: 10
  lr: {low: 0.001, high: 0.3, log: true}
  batch_size: [32, 64, 128]

Each trial is a run of train.py in sweeps/lenet5/trial-N; one runs at a time, or one per GPU. A
trial whose best epoch so far is worse than the median of the complete trials is stopped. Settings
are selected by the metric of --monitor on the validation split, never by the test split. After an
interruption, the same command continues where it stopped. The result is sweeps/lenet5/report.html,
and sweeps/lenet5/trial-N.yaml with the best settings, for train.py --config.

Optuna needs `pip install -e '.[sweep]'`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lab import console
from lab.checkpoint.atomic_io import os_errors_as_user_errors, write_atomically
from lab.checkpoint.run_dir import CONFIG, HISTORY, RunDir
from lab.config.cli import parse_arguments
from lab.config.recipes import resolve
from lab.config.sweep import Range, Searched, SweepConfig, read_sweep
from lab.data import check_dataset
from lab.errors import UserError, install_hint, run_script
from lab.models import check_model
from lab.report import sweep as page
from lab.report.run_reader import read_run

TRAIN = Path(__file__).with_name("train.py")
STORAGE, LOCK = "sweep.db", ".lock"
RUN = "run"  # the attribute of a trial with the name of its run
POLL_SECONDS = 0.5


def main(argv: list[str] | None = None) -> None:
    """Search with the arguments `argv`. Raises `UserError`."""
    config = SweepConfig(**parse_arguments(SweepConfig, argv, prog="sweep.py", description=__doc__))
    fixed, searched, first = read_sweep(Path(config.file))
    models = searched.get("model", [first.model])
    for model in models if isinstance(models, list) else ():
        check_model(model, first.pretrained)
    check_dataset(first.dataset, fixed)
    if find_spec("optuna") is None:
        raise UserError("sweep.py needs optuna", install_hint("sweep"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweep.py starts the runs itself, one per GPU", "Start it with python")
    console.configure(main_process=True, quiet=config.quiet)

    directory, metric = config.directory, f"val_{first.monitor}"
    with open_study(config, fixed, searched, metric) as study:
        run_jobs(partial(next_trial, study, config, fixed, searched, metric))
        if not any(trial.state == "complete" for trial in trials_of(study)):
            raise UserError("no trial has finished", f"See {directory}/trial-*.log")
        name, settings = study.best_trial.user_attrs[RUN], fixed | study.best_trial.params
        seeds = [first.seed + 1 + i for i in range(config.seeds)]
        jobs = [
            Job(directory / f"{name}-seed-{seed}", settings | {"seed": seed}, metric)
            for seed in seeds
        ]
        unfinished = iter([job for job in jobs if not RunDir(job.path).is_finished])
        run_jobs(lambda: next(unfinished, None))
        results = [read_run(job.path) for job in jobs if RunDir(job.path).is_finished]
        log_scale = [name for name, values in searched.items() if getattr(values, "log", False)]
        path = page.write(
            directory, metric, trials_of(study), importance_of(study), results, log_scale
        )
    console.print_line(f"best settings: {directory / name}.yaml")
    console.print_line(f"page: {path}")


@contextmanager
def open_study(
    config: SweepConfig, fixed: Mapping[str, Any], searched: Searched, metric: str
) -> Iterator[Any]:
    """Create or continue the Optuna study of a sweep, and lock its directory.

    Interrupted trials are queued again, under the name of their run, which is then resumed.
    Raises `UserError` if the directory has the sweep of other settings, or is locked.
    """
    import optuna
    from sqlalchemy import URL
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory = config.directory
    with os_errors_as_user_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process runs the sweep {directory}", "Wait for it") from None
    try:
        study = optuna.create_study(
            storage=str(URL.create("sqlite", database=str(directory / STORAGE))),
            study_name="sweep",
            load_if_exists=True,
            direction="minimize" if metric == "val_loss" else "maximize",
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=2)
            if config.pruner == "median"
            else optuna.pruners.NopPruner(),
        )
        # Another seed than in an earlier call, which would be drawn from again.
        seed = config.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        settings = json.loads(json.dumps([fixed, searched], default=asdict))
        if study.user_attrs.get("settings", settings) != settings:
            raise UserError(
                f"{directory} has a sweep of other settings than {config.file}",
                "Give another --output, or delete the directory",
            )
        study.set_user_attr("settings", settings)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            if RUN in trial.user_attrs:
                study.enqueue_trial(trial.params, {RUN: trial.user_attrs[RUN]})
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        yield study
    except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
        reason = getattr(error, "orig", None) or getattr(error.__cause__, "orig", error)
        raise UserError(
            f"cannot use the database {directory / STORAGE} ({reason})",
            "Free some space, or start again with another --output",
        ) from error
    finally:
        lock.release()


def last_trials(study: Any) -> dict[str, Any]:
    """Return the last trial of each run, by the name of the run."""
    return {t.user_attrs[RUN]: t for t in study.get_trials(deepcopy=False) if RUN in t.user_attrs}


def next_trial(
    study: Any, config: SweepConfig, fixed: dict[str, Any], searched: Searched, metric: str
) -> "Job | None":
    """Return the next trial, or None if there are --trials already."""
    from optuna.trial import TrialState

    while True:
        runs = last_trials(study)
        if sum(t.state != TrialState.WAITING for t in runs.values()) >= config.trials:
            return None
        trial = study.ask({name: distribution(values) for name, values in searched.items()})
        name = trial.user_attrs.get(RUN, f"trial-{len(runs) + 1}")
        trial.set_user_attr(RUN, name)
        settings = fixed | trial.params
        try:
            resolve(settings)
        except UserError as error:
            console.warn(f"{name} is not valid: {error}")
            study.tell(trial, state=TrialState.FAIL)
        else:
            return Job(config.directory / name, settings, metric, study, trial)


def distribution(values: Range | list[Any]) -> Any:
    """Return Optuna's distribution of a searched setting."""
    from optuna import distributions

    if not isinstance(values, Range):
        return distributions.CategoricalDistribution(values)
    if isinstance(values.low, int):
        return distributions.IntDistribution(values.low, int(values.high), log=values.log)
    return distributions.FloatDistribution(values.low, values.high, log=values.log)


class Job:
    """A run of train.py: that of a trial, or one with another seed."""

    def __init__(
        self, path: Path, settings: dict[str, Any], metric: str, study: Any = None,
        trial: Any = None,
    ):  # fmt: skip
        self.path, self.settings, self.metric = path, settings, metric
        self.study, self.trial = study, trial
        self.log = path.with_name(f"{path.name}.log")
        self.last_epoch, self.pruned = 0, False  # the last that was reported to Optuna

    def start(self, env: dict[str, str]) -> None:
        """Start or resume the run, with `env` added to the environment."""
        run, file = RunDir(self.path), self.path.with_name(f"{self.path.name}.yaml")
        if run.checkpoints_dir.exists():
            run.lock()  # fails if the process of a sweep that was killed still trains
            run.close()
        write_atomically(file, yaml.safe_dump(self.settings, sort_keys=False))
        words = ["--config", str(file), "--output-dir", str(self.path.parent)]
        words += ["--name", self.path.name, "--resume", "auto", "--quiet"]
        self.env, self.process = env, start_process([str(TRAIN), *words], self.log, env)

    def report(self) -> None:
        """Report new epochs of a trial to Optuna, and stop the run if it is pruned."""
        for row in read_history(self.path) if self.trial else ():
            if row["epoch"] > self.last_epoch and row[self.metric] is not None:
                self.last_epoch = row["epoch"]
                self.trial.report(row[self.metric], row["epoch"])
        if self.trial and not self.pruned and self.trial.should_prune():
            self.pruned = True
            self.process.send_signal(signal.SIGTERM)

    def finish(self, code: int) -> None:
        """Report the result of a run that has ended with an exit code.

        Raises `UserError` if it could not start, and no other run has.
        """
        name, value, state, failure = self.path.name, None, "FAIL", ""
        if code == 0:
            value = page.best_value(read_run(self.path), self.metric)
            state = "FAIL" if value is None else "COMPLETE"
        elif self.pruned:
            state = "PRUNED"
        else:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
            reason = lines[-1].removeprefix("error: ")
            failure = f"{name} failed (exit code {code}): {reason}"
        if self.trial:
            from optuna.trial import TrialState

            self.study.tell(self.trial, value, TrialState[state])
        if failure and not any(self.path.parent.glob(f"*/{CONFIG}")):
            raise UserError(failure, f"See {self.log}")
        if failure:
            console.warn(failure)
        result = page.STATES[state] if value is None else f"{self.metric} {value:.4f}"
        settings = self.trial.params if self.trial else {"seed": self.settings["seed"]}
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        console.info(f"{name}: {result} ({shown})")


def start_process(words: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen:
    """Start a Python script in a session of its own: Ctrl-C does not reach it."""
    with os_errors_as_user_errors(log), open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, env=os.environ | dict(env), start_new_session=True,
        )  # fmt: skip


def run_jobs(next_job: Callable[[], Job | None]) -> None:
    """Run jobs, one per GPU at a time, until `next_job` returns None.

    If this process is stopped, the runs save a checkpoint first.
    """
    free, running = environments(), []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while True:
            while free and (job := next_job()):
                job.start(free.pop(0))
                running.append(job)
            if not running:
                return
            time.sleep(POLL_SECONDS)
            for job in [*running]:
                code = job.process.poll()
                job.report()
                if code is not None:
                    running.remove(job)
                    free.append(job.env)
                    job.finish(code)
    finally:
        if running:
            console.warn(f"stopping {len(running)} runs, which the same command resumes")
        for job in running:
            job.process.send_signal(signal.SIGTERM)
        for job in running:
            job.process.wait()
        signal.signal(signal.SIGTERM, before)


def environments() -> list[dict[str, str]]:
    """Return the environment variables of a run on each GPU; of one run if there is no more."""
    import torch

    from lab.distributed import num_cores

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(ids) < 2:
        return [{}]
    threads = str(max(1, num_cores() // len(ids)))
    return [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads} for gpu in ids]


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the history of a run, which may be writing it."""
    file = path / HISTORY
    content = file.read_bytes() if file.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def trials_of(study: Any) -> list[page.SweepTrial]:
    """Return the trials for the page."""
    return [
        page.SweepTrial(
            name, page.STATES[t.state.name], t.params, t.value, len(t.intermediate_values)
        )
        for name, t in last_trials(study).items()
        if t.state.is_finished()
    ]


def importance_of(study: Any) -> dict[str, float]:
    """Return the importance of each searched setting; empty if too few trials are complete."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < page.MIN_TRIALS:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


if __name__ == "__main__":
    sys.exit(run_script(main))
