"""Measure how fast lab, torchvision's ImageFolder and other loaders read image files.

  python benchmarks/folder.py DATA/cifar10-jpg/train
  python benchmarks/folder.py DATA/photos --training --num-images 10000

The first command reads all images once and resizes them to 32 x 32 pixels, as lab does when a
training starts: lab is measured without its cache (first start) and with it (second start). The
second command, with --training, reads one epoch of training batches at 224 pixels, with random
resized crops, flips and normalization. Its files are generated: random crops of the photographs in
the directory, saved as JPEG files that are --size pixels wide. timm and Hugging Face datasets are
included if they are installed. "decoding" reads and decodes the files without any transform. Every
loader has two workers. The loaders run in turn, each in its own process.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from common import child, in_turn, ratios, spread, write_json

NUM_WORKERS = 2
BATCH_SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_with_torchvision(root: str) -> int:
    """Read all images with torchvision's ImageFolder and a DataLoader; return their number."""
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision.transforms import v2

    dataset = datasets.ImageFolder(root, v2.Compose([v2.PILToTensor(), v2.Resize((32, 32))]))
    loader = DataLoader(dataset, batch_size=128, num_workers=NUM_WORKERS)
    return sum(len(images) for images, _ in loader)


def read_with_lab(root: str) -> int:
    """Read all images with lab, from the cache if LAB_CACHE contains them; return their number."""
    from lab.data import DataConfig
    from lab.data.image_folder import read_folder
    from lab.data.images import in_memory

    raw_splits = read_folder(DataConfig(root, "data", 32, 0.1, 0.2, 0, 0, 0, 0))
    return in_memory(raw_splits.train, num_workers=NUM_WORKERS).images.shape[0]


def train_transform():
    """Return random resized crop, flip and normalization, for the loaders that take transforms."""
    import torch
    from torchvision.transforms import v2

    from lab.data.transforms import CROP_AREA

    return v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=CROP_AREA, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def train_with_torchvision(root: str) -> int:
    """Read an epoch with torchvision's ImageFolder and a DataLoader; return the image count."""
    from torch.utils.data import DataLoader
    from torchvision import datasets

    dataset = datasets.ImageFolder(root, train_transform())
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS)
    return sum(len(images) for images, _ in loader)


def train_with_timm(root: str) -> int:
    """Read an epoch with timm's dataset and loader; return the image count."""
    import torch
    from timm.data import create_dataset, create_loader

    from lab.data.transforms import CROP_AREA

    loader = create_loader(
        create_dataset("", root),
        (3, 224, 224),
        BATCH_SIZE,
        is_training=True,
        scale=CROP_AREA,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=NUM_WORKERS,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    return sum(len(images) for images, _ in loader)


def train_with_datasets(root: str) -> int:
    """Read an epoch with Hugging Face's imagefolder and a DataLoader; return the image count."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    transform = train_transform()
    dataset = load_dataset("imagefolder", data_dir=root, split="train")
    dataset.set_transform(
        lambda rows: {"image": [transform(image.convert("RGB")) for image in rows["image"]]}
    )
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS)
    return sum(len(batch["image"]) for batch in loader)


def train_with_lab(root: str) -> int:
    """Read an epoch of lab's training batches; return the image count."""
    from dataclasses import replace

    import torch

    from lab.config.recipes import resolve
    from lab.data import DataConfig
    from lab.data.image_folder import read_folder
    from lab.data.images import AugmentedImages
    from lab.data.loaders import LoaderOptions, build_loader
    from lab.data.transforms import BatchTransform, EvalTransform, SampleTransform

    config = resolve({"dataset": root, "image_size": 224})
    split = read_folder(DataConfig.of(config)).train
    transform = SampleTransform(("resized-crop",), EvalTransform(224), MEAN)
    loader = build_loader(
        replace(split, images=AugmentedImages(split.images, split.images, transform)),
        BatchTransform(MEAN, STD, ("flip",), "cpu"),
        LoaderOptions(0, 1, torch.device("cpu"), "streaming", NUM_WORKERS, 0.0),
        batch_size=BATCH_SIZE,
        seed=0,
    )
    count = sum(len(batch.images) for batch in loader.batches())
    loader.close()
    return count


def decode_only(root: str) -> int:
    """Read and decode all files in worker processes, without transforms; return the image count."""
    from concurrent.futures import ProcessPoolExecutor

    paths = [str(path) for path in Path(root).glob("*/*")]
    with ProcessPoolExecutor(NUM_WORKERS) as pool:
        return sum(pool.map(_decode, paths, chunksize=BATCH_SIZE))


def _decode(path: str) -> int:
    from lab.data.decode import decode

    return int(decode(path).ndim == 3)


READERS = {
    "ImageFolder": read_with_torchvision,
    "lab": read_with_lab,
    "training: ImageFolder": train_with_torchvision,
    "training: timm": train_with_timm,
    "training: datasets": train_with_datasets,
    "training: lab": train_with_lab,
    "training: decoding": decode_only,
}


def write_photographs(source: Path, target: Path, num_images: int, width: int) -> None:
    """Write `num_images` random crops of photographs as JPEG files of aspect ratio 4:3.

    They are `width` pixels wide. Smaller crops are enlarged, and then have less detail than
    photographs of that size.
    """
    from PIL import Image

    rng = random.Random(0)
    height = width * 3 // 4
    paths = sorted(path for path in source.glob("*/*") if path.is_file())
    (target / "class").mkdir()
    for i in range(num_images):
        with Image.open(rng.choice(paths)) as image:
            scale = rng.uniform(0.6, 1) * min(image.width / 4, image.height / 3)
            w, h = int(4 * scale), int(3 * scale)
            left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
            box = (left, top, left + w, top + h)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box)
            resized.save(target / "class" / f"{i:05}.jpg", quality=90)


def run_one(reader: str, root: str) -> dict:
    """Return the number of images read, the seconds without imports, and the images per second."""
    import torch
    from torchvision import datasets, transforms  # noqa: F401

    from lab.data import decode  # noqa: F401

    if "timm" in reader:
        import timm.data  # noqa: F401
    if "datasets" in reader:
        import datasets  # noqa: F401
    torch.set_num_threads(1)  # in the main process, because the workers use both cores
    start = time.perf_counter()
    count = READERS[reader](root)
    seconds = time.perf_counter() - start
    return {"images": count, "seconds": seconds, "images_per_second": count / seconds}


def compare_training(args: argparse.Namespace) -> dict:
    """Measure all loaders on generated photographs; print and return the results."""
    installed = {"timm": find_spec("timm"), "datasets": find_spec("datasets")}
    with tempfile.TemporaryDirectory() as directory:
        write_photographs(Path(args.root), Path(directory), args.num_images, args.size)

        def reader(name: str):
            return lambda: child(__file__, directory, "--one", name, HF_HOME=f"{directory}-cache")

        names = [name for name in READERS if name.startswith("training")]
        contenders = {name: reader(name) for name in names if installed.get(name.split()[-1], True)}
        results = in_turn(contenders, args.rounds, show="images_per_second")
        shutil.rmtree(f"{directory}-cache", ignore_errors=True)
    print("\n| | images/s | lab / this |\n| --- | --- | --- |")
    for name, rows in results.items():
        faster = spread(ratios(results, "training: lab", name, "images_per_second"))
        speed = spread([row["images_per_second"] for row in rows], ",.0f")
        print(f"| {name.removeprefix('training: ')} | {speed} | {faster} |")
    return results


def compare_reading(args: argparse.Namespace) -> dict:
    """Measure lab's first and second start, and ImageFolder; print and return the results."""
    with tempfile.TemporaryDirectory() as cache:
        child(__file__, args.root, "--one", "lab", LAB_CACHE=cache)  # also warms the page cache

        def first() -> dict:
            with tempfile.TemporaryDirectory() as empty:
                return child(__file__, args.root, "--one", "lab", LAB_CACHE=empty)

        contenders = {
            "ImageFolder": lambda: child(__file__, args.root, "--one", "ImageFolder"),
            "lab, first start": first,
            "lab, second start": lambda: child(
                __file__, args.root, "--one", "lab", LAB_CACHE=cache
            ),
        }
        results = in_turn(contenders, args.rounds, show="seconds")
    print("\n| | seconds | times faster than ImageFolder |\n| --- | --- | --- |")
    for name, rows in results.items():
        faster = spread(ratios(results, "ImageFolder", name, "seconds"))
        print(f"| {name} | {spread([row['seconds'] for row in rows])} | {faster} |")
    return results


def main() -> None:
    """Run the benchmark with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", help="a directory of CLASS/images")
    parser.add_argument("--training", action="store_true", help="read batches for training")
    parser.add_argument("--num-images", type=int, default=10_000, help="of --training")
    parser.add_argument("--size", type=int, default=500, help="width of the files of --training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.root)))
        return
    results = compare_training(args) if args.training else compare_reading(args)
    write_json(args.json, {"results": results})


if __name__ == "__main__":
    main()
