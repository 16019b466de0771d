"""Compare the speed of training and evaluation: the usual loops, lab, and the floor.

  python benchmarks/train_speed.py --mnist DATA --photographs DATA/cifar10-jpg
  python benchmarks/train_speed.py --mnist DATA --contenders notebook,lab,lightning,timm --rounds 5
  python benchmarks/train_speed.py --random      both cases on random images, without any data
  python benchmarks/train_speed.py --large --contenders resident-float32,resident,lab
  python benchmarks/train_speed.py --quick       test this script on a few random images

DATA is a --data-dir as for train.py; --photographs contains train/CLASS and test/CLASS. A round
takes about four minutes on 2 CPU cores. The contenders run in turn, each in its own process, so
that ratios hold on a noisy machine. All figures are medians over the rounds, with the minimum and
maximum. A contender whose package (lightning, timm) is not installed is skipped.

`resident` is the plain PyTorch loop to compare with: the images are resident on the device, in
lab's precision and memory format. `resident-float32` is the same in float32 without channels_last.
The last table splits lab's speed-up over the notebook into the steps between these loops.
"""

import argparse
import importlib.util
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

from common import child, in_turn, ratios, spread, write_json

CONTENDERS = "notebook,accelerate,lightning,resident-float32,resident,lab,floor"
PARTS = {  # the slower and the faster contender that differ in this
    "no DataLoader, no per-image transforms": ("notebook", "resident-float32"),
    "bfloat16 and channels_last": ("resident-float32", "resident"),
    "the rest of lab": ("resident", "lab"),
    "all": ("notebook", "lab"),
}


def run_one(name: str, case: dict, num_steps: int | None) -> dict:
    """Return the measurements of one contender, made in this process."""
    import accelerate  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from contenders import CONTENDERS, Case

    start = time.perf_counter()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train, evaluate = CONTENDERS[name](Case(**case))
    train(1)
    first_step = time.perf_counter() - start
    train(10)  # selects kernels, starts workers and allocates memory
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
    """Return the results of a case as Markdown tables; ratios are computed round by round."""
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
    """Return the parts of lab's speed-up as Markdown lines, or [] if a contender is missing."""
    if not {name for pair in PARTS.values() for name in pair} <= results.keys():
        return []
    lines = ["", "| times as fast by | training | evaluation |", "| --- | --- | --- |"]
    for part, pair in PARTS.items():
        cells = [spread(ratios(results, *pair, key)) for key in ("train_seconds", "eval_seconds")]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def write_random_images(directory: Path, num_train: int, num_test: int, size: int = 32) -> None:
    """Write random JPEG files of `size` pixels into train/CLASS and test/CLASS of a directory."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, num_images in (("train", num_train), ("test", num_test)):
        for number in range(num_images):
            path = directory / split / f"class{number % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


def write_random_mnist(directory: Path) -> None:
    """Write random images and labels in MNIST's format and numbers into a data directory."""
    import numpy as np

    random = np.random.default_rng(0)
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            high = 256 if len(shape) == 3 else 10
            values = random.integers(0, high, shape, dtype=np.uint8)
            header = np.array([0x800 + len(shape), *shape], dtype=">i4").tobytes()
            (raw / f"{split}-{kind}-ubyte").write_bytes(header + values.tobytes())


def installed(names: str) -> list[str]:
    """Return the contenders of a comma-separated list whose packages are installed."""
    missing = {n for n in ("lightning", "timm") if importlib.util.find_spec(n) is None}
    contenders = names.split(",")
    for name in missing.intersection(contenders):
        print(f"skipped: {name} is not installed", flush=True)
    return [name for name in contenders if name not in missing]


def main() -> None:
    """Measure the cases named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", metavar="DIR", help="LeNet-5 on MNIST from DIR")
    parser.add_argument("--photographs", metavar="DIR", help="AlexNet on the images in DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--alexnet-steps", type=int, default=40, help="number of timed steps; 0: an epoch"
    )
    parser.add_argument("--contenders", default=CONTENDERS)
    parser.add_argument("--json", metavar="FILE", help="write all measurements to FILE")
    parser.add_argument("--random", action="store_true", help="both cases, on random images")
    parser.add_argument(
        "--large", action="store_true", help="ResNet-18 on random images of 224 pixels, batch 16"
    )
    parser.add_argument("--quick", action="store_true", help="LeNet-5 on a few random images")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, case, num_steps = args.one
        print(json.dumps(run_one(name, json.loads(case), int(num_steps) or None)))
        return
    if not (args.mnist or args.photographs or args.random or args.large or args.quick):
        parser.error("give --mnist DIR, --photographs DIR or both, --random or --large")
    output, names = {}, installed(args.contenders)
    with tempfile.TemporaryDirectory() as directory:
        if args.random:
            args.mnist = args.photographs = directory
            write_random_mnist(Path(directory))
            write_random_images(Path(directory), 50_000, 10_000)
        cases = {}  # a `Case` and the number of timed steps, 0: an epoch
        if args.mnist:
            lenet5 = {"model": "lenet5", "dataset": "mnist", "data_dir": args.mnist}
            cases["LeNet-5, MNIST"] = (lenet5, 0)
        if args.photographs:
            alexnet = {"model": "alexnet", "dataset": args.photographs}
            cases["AlexNet, photographs"] = (alexnet, args.alexnet_steps)
        if args.large:
            large = Path(directory) / "large"
            write_random_images(large, 480, 160, size=224)
            resnet = {"model": "torchvision:resnet18", "dataset": str(large), "batch_size": 16}
            cases["ResNet-18, 224 pixels"] = ({**resnet, "image_size": 224}, 20)
        if args.quick:
            write_random_images(Path(directory), 300, 50)
            cases = {"LeNet-5, random images": ({"model": "lenet5", "dataset": directory}, 2)}
        for title, (case, num_steps) in cases.items():
            print(title)
            contenders = {
                name: partial(child, __file__, "--one", name, json.dumps(case), num_steps)
                for name in names
            }
            output[title] = in_turn(contenders, args.rounds, show="images_per_second")
            print(f"\n{table(output[title])}\n")
    write_json(args.json, {"quick": args.quick, "random": args.random, "cases": output})


if __name__ == "__main__":
    main()
