"""Train each pair of a model and a dataset briefly, to find pairs that diverge.

  python benchmarks/every_pair.py --mnist data --photographs DIR --log every_pair.txt
  python benchmarks/every_pair.py --models densenet,vit_tiny --datasets digits --recipe notebook

train.py trains each pair for 200 steps in ten epochs, the whole learning-rate schedule. The log
gets one line for each pair, with the mean loss of the first and of the last ten steps. Pairs in
the log are not run again. On one CPU core a pair takes about a minute for the smaller models,
and more than ten minutes for the largest.

It does not measure accuracy: the model memorizes the few samples (20 batches).
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lab and train, installed or not

EPOCHS, ENDS = 10, 10  # a loss is the mean over ENDS steps
DATASETS = ("digits", "mnist", "photographs")
COLUMNS = "{:<20} {:<12} {:<9} {:>5} {:>5} {:>7} {:>7}  {}"
HEADER = ("model", "dataset", "recipe", "steps", "batch", "first", "last", "precision, seconds")


def main() -> int:
    """Train the pairs that are not in the log. Return 1 if a loss did not fall, else 0."""
    from lab.models import MODELS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = list(MODELS)
    parser.add_argument("--models", type=lambda s: s.split(","), default=models)
    parser.add_argument("--datasets", type=lambda s: s.split(","), default=list(DATASETS))
    parser.add_argument("--mnist", metavar="DIR", help="directory of MNIST")
    parser.add_argument("--photographs", metavar="DIR", help="directory of images by class")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--log", type=Path, help="text file to append to")
    args = parser.parse_args()
    folders = {"digits": "data", "mnist": args.mnist}
    folders["photographs"] = args.photographs
    lines = args.log.read_text().splitlines() if args.log and args.log.exists() else []
    done = {tuple(line.split()[:3]) for line in lines}
    pairs = [(m, d) for m in args.models for d in args.datasets if (m, d, args.recipe) not in done]
    if not lines:
        show(args.log, COLUMNS.format(*HEADER))
    failed = False
    for model, dataset in pairs:
        if folders[dataset]:
            row = train_pair(model, dataset, folders[dataset], args)
            show(args.log, row)
            failed |= row.endswith("LOSS DID NOT FALL")
    for model, dataset in pairs:
        if not folders[dataset]:
            print(f"not run, as --{dataset} was not given: {model} on {dataset}")
    return int(failed)


def train_pair(model: str, dataset: str, folder: str, args: argparse.Namespace) -> str:
    """Train a pair for `args.steps`, and return its line of the log."""
    import train
    from lab.errors import UserError

    num_samples = args.steps * args.batch_size // EPOCHS
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        words = ["--model", model, "--dataset", folder if dataset == "photographs" else dataset]
        words += ["--data-dir", folder] if dataset == "mnist" else []
        words += ["--output-dir", output, "--name", "run", "--log-every", "1"]
        words += ["--recipe", args.recipe, "--max-steps", 0]
        words += ["--epochs", EPOCHS, "--batch-size", args.batch_size, "--threads", args.threads]
        words += [
            "--max-train-samples",
            num_samples,
            "--max-eval-samples",
            20,
        ]
        run, outcome = Path(output) / "run", ""
        try:
            if code := train.main([*map(str, words), "--quiet"]).exit_code:
                sys.exit(code)  # interrupted
        except UserError as error:
            if not run.exists():
                raise
            outcome = f"  {error.what}"
        steps = (run / "steps.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in steps]
        precision = json.loads((run / "config.json").read_text())["precision"]
    first, last = (sum(part) / len(part) for part in (losses[:ENDS], losses[-ENDS:]))
    learned = not outcome and math.isfinite(last) and last < first
    took = f"{precision}, {time.perf_counter() - start:.0f}"
    if not learned:
        took += f"{outcome}  LOSS DID NOT FALL"
    ends = (f"{first:.3f}", f"{last:.3f}")
    return COLUMNS.format(model, dataset, args.recipe, len(losses), args.batch_size, *ends, took)


def show(log: Path | None, line: str) -> None:
    """Print a line, and append it to the log."""
    print(line, flush=True)
    if log:
        with log.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
