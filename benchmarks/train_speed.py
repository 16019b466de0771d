"""Speed of training and evaluation, side by side: notebook, Accelerate loop, lab, and the floor.

  python benchmarks/train_speed.py --mnist DATA --photographs DATA/cifar10-jpg
  python benchmarks/train_speed.py --mnist DATA --rounds 5 --json out.json

DATA is a --data-dir as for train.py; photographs are a folder with train/CLASS and test/CLASS.
About four minutes a round on 2 CPU cores. Contenders run in turn, each in a process of its own,
so that ratios hold on a noisy machine; of every figure the median over the rounds is given, with
the smallest and the largest.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = ("notebook", "accelerate", "lab", "floor")


def run_one(name: str, model: str, dataset: str, data_dir: str, num_steps: int | None) -> dict:
    """What one contender gives, measured in this process."""
    import torch
    from contenders import CONTENDERS, Case

    libraries = time.perf_counter()
    peak_idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train, evaluate = CONTENDERS[name](Case(model, dataset, data_dir))
    train(1)  # to the first step: data read, kernels chosen
    first_step = time.perf_counter() - libraries
    train(3)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    num_images = train(num_steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    train_seconds = time.perf_counter() - start
    start = time.perf_counter()
    accuracy = evaluate()
    return {
        "images_per_second": num_images / train_seconds,
        "train_seconds": train_seconds,
        "eval_seconds": time.perf_counter() - start if accuracy is not None else None,
        "accuracy": accuracy,
        "first_step_seconds": first_step,
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_idle) / 1024,
    }


def run_rounds(case: tuple[str, str, str, int | None], names: list[str], rounds: int) -> dict:
    """The results of `rounds` rounds, A B C A B C: a list a contender."""
    model, dataset, data_dir, num_steps = case
    results: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, model, dataset, data_dir]
            done = subprocess.run(
                [*command, str(num_steps or 0)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            speed = results[name][-1]["images_per_second"]
            print(f"  round {number + 1} {name:12} {speed:10,.0f} images/s", flush=True)
    return results


def spread(values: list[float], form: str) -> str:
    """median (smallest - largest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} - {high:{form}})"


def table(results: dict[str, list[dict]]) -> list[str]:
    """The figures of a case as lines of a Markdown table; ratios are taken round by round."""
    others = [name for name in results if name != "lab"]
    lines = [
        "| | images/s | eval s | first step s | MB above idle | "
        + " | ".join(f"lab / {name}, images/s" for name in others)
        + " |",
        "| --- " * (5 + len(others)) + "|",
    ]
    for name, rows in results.items():
        evals = [row["eval_seconds"] for row in rows if row["eval_seconds"] is not None]
        ratios = [
            [
                a["images_per_second"] / b["images_per_second"]
                for a, b in zip(rows, results[o], strict=True)
            ]
            for o in others
        ]
        lines.append(
            f"| {name} | {spread([r['images_per_second'] for r in rows], ',.0f')} "
            f"| {spread(evals, '.2f') if evals else '-'} "
            f"| {spread([r['first_step_seconds'] for r in rows], '.1f')} "
            f"| {spread([r['memory_mb'] for r in rows], '.0f')} | "
            + " | ".join(spread(r, ".2f") if name == "lab" else "" for r in ratios)
            + " |"
        )
    if "lab" in results and "notebook" in results:
        for other in ("notebook", "accelerate"):
            if other not in results:
                continue
            epochs = [
                (b["train_seconds"] + b["eval_seconds"]) / (a["train_seconds"] + a["eval_seconds"])
                for a, b in zip(results["lab"], results[other], strict=True)
            ]
            evals = [
                b["eval_seconds"] / a["eval_seconds"]
                for a, b in zip(results["lab"], results[other], strict=True)
            ]
            lines += [
                "",
                f"Against {other}: training and evaluation {spread(epochs, '.2f')} times faster, "
                f"evaluation alone {spread(evals, '.2f')}.",
            ]
    return lines


def environment() -> dict:
    """The machine, versions and commit."""
    import torch

    from lab.rundir import commit, versions

    return {
        "machine": platform.platform(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", metavar="DIR", help="LeNet-5 on MNIST from DIR")
    parser.add_argument("--photographs", metavar="DIR", help="AlexNet on the pictures in DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alexnet-steps", type=int, default=40, help="steps timed; 0: an epoch")
    parser.add_argument("--contenders", default=",".join(NAMES))
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, model, dataset, data_dir, num_steps = args.one
        print(json.dumps(run_one(name, model, dataset, data_dir, int(num_steps) or None)))
        return
    cases = {}
    if args.mnist:
        cases["LeNet-5, MNIST"] = ("lenet5", "mnist", args.mnist, None)
    if args.photographs:
        cases["AlexNet, photographs"] = (
            "alexnet", "folder", args.photographs, args.alexnet_steps or None
        )  # fmt: skip
    if not cases:
        parser.error("give --mnist DIR, --photographs DIR or both")
    output = {"command": sys.argv, "environment": environment(), "cases": {}}
    for title, case in cases.items():
        print(title)
        results = run_rounds(case, args.contenders.split(","), args.rounds)
        output["cases"][title] = results
        print("\n".join(table(results)) + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(output, indent=1) + "\n")


if __name__ == "__main__":
    main()
