"""Cross-validate training from scratch, of the head only, and fine-tuning on a folder of images.

  python benchmarks/finetune.py IMAGES --init-checkpoint efficientnet_lite0.safetensors

IMAGES has one directory for each class. In each fold, a fifth of every class is the test split and
a tenth of the rest the validation split. The weights are those of benchmarks/pretrained.py. All
folds together count each image once; the intervals are 95 % bootstrap intervals over images.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from common import write_json

NUM_FOLDS = 5
METHODS = {
    "scratch": "--recipe default --epochs 20 --batch-size 32",
    "head": "--recipe finetune --freeze backbone --epochs 1",
    "finetune": "--recipe finetune",
}


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--init-checkpoint", required=True, metavar="FILE")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="42,0,1")
    parser.add_argument("--folds", default=",".join(map(str, range(NUM_FOLDS))))
    parser.add_argument("--options", default="", help="more options of train.py")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds.split(","):
        for method in args.methods.split(","):
            options = [*METHODS[method].split(), *args.options.split(), "--seed", seed]
            options += ["--model", args.model]
            if method != "scratch":
                options += ["--init-checkpoint", args.init_checkpoint]
            folds = [
                train_fold(args.images, int(k), options) | {"fold": int(k)}
                for k in args.folds.split(",")
            ]
            rows.append({"method": method, "seed": int(seed), **summary(folds), "folds": folds})
            shown = {k: v for k, v in rows[-1].items() if k != "folds"}
            print(json.dumps(shown), flush=True)
    if args.json:
        write_json(args.json, {"rows": rows})


def write_manifest(images: Path, fold: int, path: Path) -> None:
    """Write the manifest of a fold: of every class, image i is tested in fold i % NUM_FOLDS.

    The images of a class are in a random order that does not depend on the fold.
    """
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split"))
        for directory in sorted(p for p in images.iterdir() if p.is_dir()):
            names = sorted(os.listdir(directory))
            for i, k in enumerate(np.random.RandomState(0).permutation(len(names))):
                split = "test" if i % NUM_FOLDS == fold else "train"
                writer.writerow((f"{directory.name}/{names[k]}", directory.name, split))


def train_fold(images: Path, fold: int, options: list[str]) -> dict:
    """Train one fold; return its test labels and predictions, and the seconds it took."""
    import train

    with tempfile.TemporaryDirectory() as output:
        directory = Path(output) / "images"
        directory.mkdir()
        for path in images.iterdir():
            (directory / path.name).symlink_to(path.resolve())
        manifest = directory / "fold.csv"
        write_manifest(images, fold, manifest)
        start = time.perf_counter()
        words = ["--dataset", str(manifest), "--output-dir", output, "--name", "run", "--quiet"]
        run = train.main([*words, *options])
        seconds = time.perf_counter() - start
        rows = list(csv.DictReader((run.path / "predictions.csv").open()))
        history = (run.path / "history.jsonl").read_text().splitlines()
    labels, predictions = ([int(row[key]) for row in rows] for key in ("label", "prediction"))
    first_loss = json.loads(history[0])["train_loss"]
    fold_result = {"labels": labels, "predictions": predictions, "seconds": round(seconds, 1)}
    fold_result |= {"epochs": len(history), "first_epoch_loss": first_loss}
    accuracy = np.mean(np.equal(labels, predictions))
    print(f"  fold {fold}: {accuracy:.4f} in {seconds:.0f} s, {len(history)} epochs", flush=True)
    return fold_result


def summary(folds: list[dict]) -> dict:
    """Return accuracy and macro-F1 over the images of all folds, with their intervals."""
    labels, predictions = (
        np.concatenate([fold[key] for fold in folds]) for key in ("labels", "predictions")
    )
    random, draws = np.random.RandomState(0), []
    for _ in range(2000):
        index = random.randint(len(labels), size=len(labels))
        draws.append(scores(labels[index], predictions[index]))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    accuracy, macro_f1 = scores(labels, predictions)
    return {
        "num_images": len(labels),
        "accuracy": round(accuracy, 4),
        "accuracy_interval": [round(low[0], 4), round(high[0], 4)],
        "macro_f1": round(macro_f1, 4),
        "macro_f1_interval": [round(low[1], 4), round(high[1], 4)],
        "minutes_per_fold": round(float(np.mean([f["seconds"] for f in folds])) / 60, 2),
    }


def scores(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float]:
    """Return accuracy and macro-F1 over the classes that occur."""
    f1 = []
    for k in np.union1d(labels, predictions):
        correct = np.sum((labels == k) & (predictions == k))
        f1.append(2 * correct / (np.sum(labels == k) + np.sum(predictions == k)))
    return float(np.mean(labels == predictions)), float(np.mean(f1))


if __name__ == "__main__":
    main()
