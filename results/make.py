"""Trains the rows of README and docs/architectures.md, in pieces: each call goes on with the rest.

  python results/make.py --list                          the rows, and which of them are there
  python results/make.py                                 nine minutes of them, for one GPU
  python results/make.py --photographs data/cifar10-jpg  on CIFAR-10's pictures in a folder
  python results/make.py --epochs 3                      every network for as long, to compare them
  python results/make.py --short --minutes 600           ... on 5,000 pictures, for a CPU

Runs lie in runs/results; what is small of a finished one is copied into results/NAME. A row that is
there is not trained again. When none is left, compare.py sets them side by side.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("config.json", "history.jsonl", "report.json")
LEAST_SECONDS = 60  # too few to start a row in: importing, reading data, an evaluation
NETWORKS = ("googlenet", "densenet", "densenet121", "mobilenet", "mobilenet_v3_small",
            "efficientnet", "vit_tiny", "vit_small", "vit_hybrid")  # fmt: skip
ALL = ("lenet5", "alexnet", *NETWORKS)
LARGE = {"densenet121", "vit_small"}  # without a short row: too slow on a CPU
SHORT = "--epochs 3 --batch-size 64 --max-train-samples 5000 --max-eval-samples 2000 --threads 1"


def rows(photographs: str, data_dir: str, short: bool, epochs: int = 0) -> dict[str, list[str]]:
    """The options of train.py for each row, by its name; `photographs` "": CIFAR-10 itself.

    `epochs`: as many for every network, on all of the data; `short`: 3 on a part of them.
    """
    name = "photographs" if photographs else "cifar10"
    pictures = f"--dataset folder --data-dir {shlex.quote(photographs)}"
    if not photographs:
        pictures = f"--dataset cifar10 --data-dir {shlex.quote(data_dir)}"
    digits = f"--dataset mnist --data-dir {shlex.quote(data_dir)}"
    found = {}
    if short:
        for model in (m for m in ALL if m not in LARGE):
            found[f"short-{model}-{name}"] = f"--model {model} {pictures} {SHORT}"
        found["short-alexnet-mnist"] = f"--model alexnet {digits} {SHORT}"
        found["short-lenet5-mnist"] = f"--model lenet5 {digits} {SHORT}"
    elif epochs:
        for model in ALL:
            found[f"{model}-{name}-{epochs}"] = f"--model {model} {pictures} --epochs {epochs}"
        for model in ("lenet5", "alexnet"):
            found[f"{model}-mnist-{epochs}"] = f"--model {model} {digits} --epochs {epochs}"
    else:
        found["lenet5-mnist-notebook"] = f"--model lenet5 {digits} --recipe notebook"
        for seed in range(5):
            row = f"--model lenet5 {digits} --seed {seed}"
            found[f"lenet5-mnist-default-seed{seed}"] = row
        for recipe in ("notebook", "default"):
            for number in (8, 20):
                options = f"--model alexnet {pictures} --recipe {recipe} --epochs {number}"
                found[f"alexnet-{name}-{recipe}-{number}"] = options
        for seed in (0, 1):
            row = f"--model alexnet {pictures} --seed {seed}"
            found[f"alexnet-{name}-default-20-seed{seed}"] = row
        found[f"lenet5-{name}"] = f"--model lenet5 {pictures}"
        found["alexnet-mnist"] = f"--model alexnet {digits}"
        for model in NETWORKS:
            found[f"{model}-{name}"] = f"--model {model} {pictures}"
    return {row: shlex.split(options) for row, options in found.items()}


def train(name: str, options: list[str], runs: Path, kept: Path, seconds: float) -> int:
    """Trains a row, or goes on with it, for about `seconds`; train.py's exit code."""
    options = [*options, "--output-dir", str(runs), "--name", name]
    going_on = ["--resume", "auto", "--max-hours", f"{seconds / 3600:.6f}"]
    command = [sys.executable, str(ROOT / "train.py"), *options, *going_on]
    print(f"\n{name}", flush=True)
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{name}.log").open("a") as log:
        log.write(f"$ python train.py {shlex.join(options)}\n")
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0 and (runs / name / "report.json").exists():
        target = kept / name
        target.mkdir(parents=True, exist_ok=True)
        for file in KEPT[:-1]:
            shutil.copyfile(runs / name / file, target / file)
        shutil.copyfile(runs / f"{name}.log", target / "log.txt")
        shutil.copyfile(runs / name / KEPT[-1], target / KEPT[-1])  # last: it marks a row as there
    return code


def main(argv: list[str] | None = None) -> int:
    """Trains what is not there yet; 1 where a training failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="stop after so long [9]")
    parser.add_argument("--photographs", default="", metavar="DIR", help="train/ and test/ in it")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="of the others [data]")
    parser.add_argument("--short", action="store_true", help="short rows instead")
    parser.add_argument("--epochs", type=int, default=0, help="every network for as many instead")
    parser.add_argument("--only", default="", metavar="LIST", help="rows, a list with commas")
    parser.add_argument("--list", action="store_true", help="list the rows, and train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), metavar="DIR")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    wanted = rows(args.photographs, args.data_dir, args.short, args.epochs)
    if args.only:
        unknown = set(args.only.split(",")) - wanted.keys()
        if unknown:
            parser.error(f"no row is called {', '.join(sorted(unknown))}; --list lists them")
        wanted = {name: wanted[name] for name in args.only.split(",")}
    left = [name for name in wanted if not (args.output / name / "report.json").exists()]
    if args.list:
        for name, options in wanted.items():
            state = "-" if name in left else "there"
            print(f"{state:6} {name:30} python train.py {shlex.join(options)}")
        return 0
    while left and (seconds := end - time.monotonic()) > LEAST_SECONDS:
        name = left[0]
        code = train(name, wanted[name], args.runs, args.output, seconds - LEAST_SECONDS / 2)
        if code:
            print(f"train.py ended with {code}: {args.runs / name}.log", file=sys.stderr)
            return 1
        if not (args.output / name / "report.json").exists():  # stopped by the time limit
            break
        left.remove(name)
    if left:
        print(f"left, for the next calls: {', '.join(left)}")
        return 0
    finished = [str(args.runs / name) for name in wanted if (args.runs / name).exists()]
    command = [sys.executable, str(ROOT / "compare.py"), *finished]
    if len(finished) > 1:
        command += ["--output", str(args.runs / "comparison")]
    return subprocess.run(command, check=False).returncode if finished else 0


if __name__ == "__main__":
    sys.exit(main())
