"""Train the rows of README and docs/architectures.md; each call continues where the last stopped.

  python results/make.py --list                          list the rows, and which are finished
  python results/make.py                                 train for nine minutes, on one GPU
  python results/make.py --photographs data/cifar10-jpg  use CIFAR-10 as image files
  python results/make.py --epochs 3                      train all models for 3 epochs
  python results/make.py --short --minutes 600           train on 5,000 images, on a CPU

Runs are in runs/results; the small files of a finished run are copied to results/NAME. To repeat a
finished row, remove results/NAME and runs/results/NAME. After the last row, compare.py compares the
runs.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED_FILES = ("config.json", "history.jsonl", "report.json")
MIN_SECONDS = 60  # with less time left, no row is started: imports and data take a while
OTHER_MODELS = ("googlenet", "densenet", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
            "efficientnet_b0", "vit_tiny", "vit_small", "vit_hybrid")  # fmt: skip
ALL_MODELS = ("lenet5", "alexnet", *OTHER_MODELS)
LARGE = {"densenet121", "vit_small"}  # too slow on a CPU for a short row
SHORT = "--epochs 3 --batch-size 64 --max-train-samples 5000 --max-eval-samples 2000 --threads 1"


def rows(photographs: str, data_dir: str, short: bool, epochs: int = 0) -> dict[str, list[str]]:
    """Return the options of train.py for each row, by the row's name.

    `photographs` is a directory of images, or "" for CIFAR-10 itself. `epochs` selects the rows of
    all models for that many epochs, `short` those of 3 epochs on a part of the data.
    """
    name = "photographs" if photographs else "cifar10"
    images = f"--dataset {shlex.quote(photographs)} --monitor accuracy"
    if not photographs:
        images = f"--dataset cifar10 --data-dir {shlex.quote(data_dir)}"
    digits = f"--dataset mnist --data-dir {shlex.quote(data_dir)}"
    commands = {}
    if short:
        for model in (m for m in ALL_MODELS if m not in LARGE):
            commands[f"short-{model}-{name}"] = f"--model {model} {images} {SHORT}"
        commands["short-alexnet-mnist"] = f"--model alexnet {digits} {SHORT}"
        commands["short-lenet5-mnist"] = f"--model lenet5 {digits} {SHORT}"
    elif epochs:
        for model in ALL_MODELS:
            commands[f"{model}-{name}-{epochs}"] = f"--model {model} {images} --epochs {epochs}"
        for model in ("lenet5", "alexnet"):
            commands[f"{model}-mnist-{epochs}"] = f"--model {model} {digits} --epochs {epochs}"
    else:
        commands["lenet5-mnist-notebook"] = f"--model lenet5 {digits} --recipe notebook"
        for seed in range(5):
            row = f"--model lenet5 {digits} --seed {seed}"
            commands[f"lenet5-mnist-default-seed{seed}"] = row
        for recipe in ("notebook", "default"):
            for number in (8, 20):
                options = f"--model alexnet {images} --recipe {recipe} --epochs {number}"
                commands[f"alexnet-{name}-{recipe}-{number}"] = options
        for seed in (0, 1):
            row = f"--model alexnet {images} --seed {seed}"
            commands[f"alexnet-{name}-default-20-seed{seed}"] = row
        commands[f"lenet5-{name}"] = f"--model lenet5 {images}"
        commands["alexnet-mnist"] = f"--model alexnet {digits}"
        for model in OTHER_MODELS:
            commands[f"{model}-{name}"] = f"--model {model} {images}"
    return {row: shlex.split(options) for row, options in commands.items()}


def train(name: str, options: list[str], runs: Path, output: Path, seconds: float) -> int:
    """Train a row, or resume it, for about `seconds`. Return the exit code of train.py."""
    options = [*options, "--output-dir", str(runs), "--name", name]
    resume = ["--resume", "auto", "--max-hours", f"{seconds / 3600:.6f}"]
    command = [sys.executable, str(ROOT / "train.py"), *options, *resume]
    print(f"\n{name}", flush=True)
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{name}.log").open("a") as log:
        log.write(f"$ python train.py {shlex.join(options)}\n")
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0 and (runs / name / "report.json").exists():
        target = output / name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runs / f"{name}.log", target / "log.txt")
        for file in COPIED_FILES:  # the last one marks the row as finished
            shutil.copyfile(runs / name / file, target / file)
    return code


def main(argv: list[str] | None = None) -> int:
    """Train the rows that are not finished. Return 1 if a run failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="stop after this time [9]")
    parser.add_argument(
        "--photographs",
        default="",
        metavar="DIR",
        help="image files in DIR/train/CLASS and DIR/test/CLASS",
    )
    parser.add_argument(
        "--data-dir", default="data", metavar="DIR", help="directory of MNIST and CIFAR-10 [data]"
    )
    parser.add_argument("--short", action="store_true", help="train the short rows instead")
    parser.add_argument(
        "--epochs", type=int, default=0, help="train all models for this many epochs"
    )
    parser.add_argument("--only", default="", metavar="LIST", help="names of rows, with commas")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    parser.add_argument("--output", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), metavar="DIR")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    wanted = rows(args.photographs, args.data_dir, args.short, args.epochs)
    if args.only:
        unknown = set(args.only.split(",")) - wanted.keys()
        if unknown:
            parser.error(f"unknown rows: {', '.join(sorted(unknown))}; see --list")
        wanted = {name: wanted[name] for name in args.only.split(",")}
    left = [name for name in wanted if not (args.output / name / "report.json").exists()]
    if args.list:
        for name, options in wanted.items():
            state = "-" if name in left else "finished"
            print(f"{state:9} {name:30} python train.py {shlex.join(options)}")
        return 0
    while left and (seconds := end - time.monotonic()) > MIN_SECONDS:
        name = left[0]
        code = train(name, wanted[name], args.runs, args.output, seconds - MIN_SECONDS / 2)
        if code:
            print(
                f"train.py failed with exit code {code}, see {args.runs / name}.log",
                file=sys.stderr,
            )
            return 1
        if not (args.output / name / "report.json").exists():  # stopped by the time limit
            break
        left.remove(name)
    if left:
        print(f"not finished: {', '.join(left)}")
        return 0
    finished = [str(args.runs / name) for name in wanted if (args.runs / name).exists()]
    command = [sys.executable, str(ROOT / "compare.py"), *finished]
    if len(finished) > 1:
        command += ["--output", str(args.runs / "comparison")]
    return subprocess.run(command, check=False).returncode if finished else 0


if __name__ == "__main__":
    sys.exit(main())
