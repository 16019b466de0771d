"""Compare training from scratch, training only the classifier, and fine-tuning all layers.

  python benchmarks/finetune.py IMAGES --init-checkpoint efficientnet_lite0.safetensors
  python benchmarks/finetune.py cifar10-jpg --per-class 30 --init-checkpoint ...

benchmarks/pretrained.py writes the pretrained weights. The first command runs five-fold
cross-validation on IMAGES, which has one directory for each class: each fold tests on a fifth of
every class, and each image is tested once. The second command trains on a random sample of
IMAGES/train, and tests on the first hundred images of each class in IMAGES/test. A tenth of the
training images is held out for validation. Training from scratch is at 96 pixels, because it would
take too long at 224. The intervals are 95 % bootstrap intervals over the test images.
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
NUM_TEST_IMAGES = 100  # of each class, with --per-class
METHODS = {
    "scratch": "--recipe default --epochs 20 --batch-size 32 --image-size 96",
    "head": "--recipe finetune --freeze backbone --epochs 1",
    "finetune": "--recipe finetune",
}


def main() -> None:
    """Run the benchmark with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--init-checkpoint", required=True, metavar="FILE")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="42,0,1")
    parser.add_argument("--folds", default=",".join(map(str, range(NUM_FOLDS))))
    parser.add_argument("--per-class", type=int, default=0, help="training images of each class")
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
            if args.per_class:
                rows_of = [sample_rows(args.images, args.per_class, int(seed))]
            else:
                rows_of = [fold_rows(args.images, int(k)) for k in args.folds.split(",")]
            folds = [train_fold(args.images, rows, options) for rows in rows_of]
            rows.append({"method": method, "seed": int(seed), **summary(folds), "folds": folds})
            shown = {k: v for k, v in rows[-1].items() if k != "folds"}
            print(json.dumps(shown), flush=True)
    if args.json:
        content = {"images": args.images.name, "per_class": args.per_class, "rows": rows}
        write_json(args.json, content)


def list_classes(images: Path) -> dict[str, list[str]]:
    """Return the sorted file names of each class directory."""
    directories = sorted(path for path in images.iterdir() if path.is_dir())
    return {directory.name: sorted(os.listdir(directory)) for directory in directories}


def fold_rows(images: Path, fold: int) -> list[tuple[str, str, str]]:
    """Return (file, label, split) of each image in a fold of the cross-validation.

    The images of each class are shuffled, in the same order for every fold. Image i of a class is a
    test image in fold i % 5.
    """
    rows = []
    for label, names in list_classes(images).items():
        for i, k in enumerate(np.random.RandomState(0).permutation(len(names))):
            split = "test" if i % NUM_FOLDS == fold else "train"
            rows.append((f"{label}/{names[k]}", label, split))
    return rows


def sample_rows(images: Path, per_class: int, seed: int) -> list[tuple[str, str, str]]:
    """Return (file, label, split) of all test images and of `per_class` training images per class.

    The training images are drawn at random with `seed`.
    """
    rows = []
    for label, names in list_classes(images / "train").items():
        chosen = np.random.RandomState(seed).permutation(len(names))[:per_class]
        rows += [(f"train/{label}/{names[k]}", label, "train") for k in chosen]
    for label, names in list_classes(images / "test").items():
        rows += [(f"test/{label}/{name}", label, "test") for name in names[:NUM_TEST_IMAGES]]
    return rows


def train_fold(images: Path, rows: list[tuple[str, str, str]], options: list[str]) -> dict:
    """Train on a manifest with these rows.

    Return the labels and predictions of the test images, the duration in seconds, the number of
    epochs and the training loss of the first epoch.
    """
    import train

    with tempfile.TemporaryDirectory() as output:
        directory = Path(output) / "images"
        directory.mkdir()
        for path in images.iterdir():
            (directory / path.name).symlink_to(path.resolve())
        manifest = directory / "fold.csv"
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows([("file", "label", "split"), *rows])
        start = time.perf_counter()
        words = ["--dataset", str(manifest), "--output-dir", output, "--name", "run", "--quiet"]
        run = train.main([*words, *options])
        seconds = time.perf_counter() - start
        results = list(csv.DictReader((run.path / "predictions.csv").open()))
        history = (run.path / "history.jsonl").read_text().splitlines()
    labels, predictions = ([int(row[key]) for row in results] for key in ("label", "prediction"))
    first_loss = json.loads(history[0])["train_loss"]
    fold_result = {"labels": labels, "predictions": predictions, "seconds": round(seconds, 1)}
    fold_result |= {"epochs": len(history), "first_epoch_loss": first_loss}
    accuracy = np.mean(np.equal(labels, predictions))
    print(f"  accuracy {accuracy:.4f} in {seconds:.0f} s, {len(history)} epochs", flush=True)
    return fold_result


def summary(folds: list[dict]) -> dict:
    """Return accuracy and macro-F1 on the test images of all folds, with bootstrap intervals."""
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
    """Return accuracy, and macro-F1 over the classes that occur or are predicted."""
    f1 = []
    for k in np.union1d(labels, predictions):
        correct = np.sum((labels == k) & (predictions == k))
        f1.append(2 * correct / (np.sum(labels == k) + np.sum(predictions == k)))
    return float(np.mean(labels == predictions)), float(np.mean(f1))


if __name__ == "__main__":
    main()
