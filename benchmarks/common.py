"""Functions that the benchmarks share: child processes in turn, medians, the environment."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # lab, installed or not


def child(script: str, *words: object, **environment: str) -> dict[str, Any]:
    """Run `script` with the arguments `words`, and return the JSON on its last line of output."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(contenders: dict[str, Callable[[], dict]], rounds: int, show: str) -> dict[str, list]:
    """Run A B C A B C ..., so that noise affects all alike. Return each contender's results."""
    results: dict[str, list] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            results[name].append(run())
            print(f"  round {number + 1}  {name:24} {results[name][-1][show]:12,.2f}", flush=True)
    return results


def ratios(results: dict[str, list], a: str, b: str, key: str) -> list[float]:
    """Return the ratios a / b, round by round."""
    return [x[key] / y[key] for x, y in zip(results[a], results[b], strict=True)]


def spread(values: list[float], form: str = ".2f") -> str:
    """Return "median (min - max)"."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the commit."""
    import torch

    from lab.checkpoint.provenance import commit, versions

    return {
        "command": sys.argv,
        "machine": platform.platform(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "commit": commit(),
    }


def write_json(path: str | None, content: dict) -> None:
    """Write `content` and the environment to `path`, if there is one."""
    if path:
        text = json.dumps({"environment": environment(), **content}, indent=1)
        Path(path).write_text(text + "\n")


def prepare(accelerator, model, config):
    """Return the training step of a model, built as train.py builds it."""
    from lab.engine.ema import ModelEma
    from lab.engine.optimizer import build_optimizer
    from lab.engine.training import TrainStep, configure_model

    model = configure_model(model, config, accelerator.device)
    ema = ModelEma(model, config.ema_decay) if config.ema_decay else None
    optimizer = build_optimizer(model, config, accelerator)
    wrapped_model = accelerator.prepare(model)
    if accelerator.scaler:
        optimizer = accelerator.prepare(optimizer)
    return TrainStep(accelerator, config, model, wrapped_model, optimizer, ema)
