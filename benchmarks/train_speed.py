"""Speed of training and evaluation, side by side: the usual loops, lab, and the floor.

  python benchmarks/train_speed.py --mnist DATA --photographs DATA/cifar10-jpg
  python benchmarks/train_speed.py --mnist DATA --contenders notebook,lab,lightning,timm --rounds 5
  python benchmarks/train_speed.py --quick       tiny random images: does the script run?

DATA is a --data-dir as for train.py; the photographs lie in train/CLASS and test/CLASS. About four
minutes a round on 2 CPU cores. Contenders run in turn, each in a process of its own, so that
ratios hold on a noisy machine; of every figure the median over the rounds is given, with the
smallest and the largest. `lightning` and `timm` need the package of that name.

`resident` is the plain PyTorch loop to measure against: the images lie on the device, and it has
lab's bfloat16 and channels_last. `resident-float32` has neither. The last table divides what lab
gains on the notebook into the parts that lie between these loops.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

from common import child, in_turn, ratios, spread, write_json

CONTENDERS = "notebook,accelerate,resident-float32,resident,lab,floor"
PARTS = {  # what lies between two contenders: the slower and the faster
    "no DataLoader, no per-image transforms": ("notebook", "resident-float32"),
    "bfloat16 and channels_last": ("resident-float32", "resident"),
    "the rest of lab": ("resident", "lab"),
    "all": ("notebook", "lab"),
}


def run_one(name: str, model: str, dataset: str, data_dir: str, num_steps: int | None) -> dict:
    """What one contender gives, measured in this process."""
    import accelerate  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from contenders import CONTENDERS, Case

    start = time.perf_counter()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train, evaluate = CONTENDERS[name](Case(model, dataset, data_dir))
    train(1)
    first_step = time.perf_counter() - start
    train(10)  # kernels chosen, workers started once, memory taken
    start = time.perf_counter()
    num_images = train(num_steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    train_seconds = time.perf_counter() - start
    start = time.perf_counter()
    accuracy = evaluate()
    eval_seconds = time.perf_counter() - start if accuracy is not None else 0.0
    return {
        "images_per_second": num_images / train_seconds,
        "train_seconds": train_seconds,
        "eval_seconds": eval_seconds,
        "both_seconds": train_seconds + eval_seconds,
        "accuracy": accuracy,
        "first_step_seconds": first_step,
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024,
    }


def table(results: dict[str, list[dict]]) -> str:
    """The figures of a case as Markdown; ratios are taken round by round."""
    lines = ["| | images/s | evaluation, s | first step after imports, s | MB above imports |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        keys = ("images_per_second", "eval_seconds", "first_step_seconds", "memory_mb")
        cells = [spread([row[key] for row in rows], ",.1f") for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| lab against | training | training and evaluation | evaluation |"]
    lines.append("| --- | --- | --- | --- |")
    for name in results:
        if name == "lab" or "lab" not in results:
            continue
        cells = [spread(ratios(results, name, "lab", "train_seconds"))]
        if results[name][0]["accuracy"] is None:  # it only trains; times a batch
            cells = [spread(ratios(results, "lab", name, "images_per_second")), "-", "-"]
        else:
            cells += [
                spread(ratios(results, name, "lab", key))
                for key in ("both_seconds", "eval_seconds")
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *parts_table(results)])


def parts_table(results: dict[str, list[dict]]) -> list[str]:
    """Return lab's gain on the notebook in parts, as Markdown; nothing where a loop is missing."""
    if not {name for pair in PARTS.values() for name in pair} <= results.keys():
        return []
    lines = ["", "| times as fast by | training | evaluation |", "| --- | --- | --- |"]
    for part, pair in PARTS.items():
        cells = [spread(ratios(results, *pair, key)) for key in ("train_seconds", "eval_seconds")]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def write_random_images(folder: Path) -> None:
    """Write some JPEG files of noise into train/CLASS and test/CLASS of a folder."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, num_images in (("train", 300), ("test", 50)):
        for number in range(num_images):
            path = folder / split / f"class{number % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


def main() -> None:
    """Runs the cases that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", metavar="DIR", help="LeNet-5 on MNIST from DIR")
    parser.add_argument("--photographs", metavar="DIR", help="AlexNet on the pictures in DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alexnet-steps", type=int, default=40, help="steps timed; 0: an epoch")
    parser.add_argument("--contenders", default=CONTENDERS)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="LeNet-5 on tiny random images")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, model, dataset, data_dir, num_steps = args.one
        print(json.dumps(run_one(name, model, dataset, data_dir, int(num_steps) or None)))
        return
    cases = {
        "LeNet-5, MNIST": ("lenet5", "mnist", args.mnist, 0),
        "AlexNet, photographs": ("alexnet", "folder", args.photographs, args.alexnet_steps),
    }
    if not (args.mnist or args.photographs or args.quick):
        parser.error("give --mnist DIR, --photographs DIR or both")
    output = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            write_random_images(Path(folder))
            cases = {"LeNet-5, random images": ("lenet5", "folder", folder, 2)}
        for title, (model, dataset, data_dir, num_steps) in cases.items():
            if not data_dir:
                continue
            print(title)
            contenders = {
                name: partial(child, __file__, "--one", name, model, dataset, data_dir, num_steps)
                for name in args.contenders.split(",")
            }
            output[title] = in_turn(contenders, args.rounds, show="images_per_second")
            print(f"\n{table(output[title])}\n")
    write_json(args.json, {"quick": args.quick, "cases": output})


if __name__ == "__main__":
    main()
