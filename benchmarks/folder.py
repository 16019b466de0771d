"""Compare lab's first and second start on an image directory with torchvision's ImageFolder.

  python benchmarks/folder.py DATA/cifar10-jpg/train

Each contender reads all images once, as uint8 of 32 x 32, with 2 threads or 2 workers. They run in
turn, each in its own process; a round takes about 40 s on 2 CPU cores for 50,000 small JPEG files.
"""

import argparse
import json
import tempfile
import time

from common import child, in_turn, ratios, spread, write_json


def read_with_torchvision(root: str) -> int:
    """Read torchvision's ImageFolder with a DataLoader and two workers; return the count."""
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision.transforms import v2

    dataset = datasets.ImageFolder(root, v2.Compose([v2.PILToTensor(), v2.Resize((32, 32))]))
    loader = DataLoader(dataset, batch_size=128, num_workers=2)
    return sum(len(images) for images, _ in loader)


def read_with_lab(root: str) -> int:
    """Read the directory with lab, from the cache if LAB_CACHE contains it; return the count."""
    from lab.data import DataConfig
    from lab.data.image_folder import read_folder
    from lab.data.splits import in_memory

    raw_splits = read_folder(DataConfig(root, "data", 32, 0.1, 0.2, 0, 0, 0, 0))
    return in_memory(raw_splits.train, num_workers=2).images.shape[0]


READERS = {"torchvision": read_with_torchvision, "lab": read_with_lab}


def run_one(reader: str, root: str) -> dict:
    """Return the number of images read and the seconds without imports."""
    from torchvision import datasets, transforms  # noqa: F401

    from lab.data import decode  # noqa: F401

    start = time.perf_counter()
    count = READERS[reader](root)
    return {"images": count, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", help="a directory of CLASS/images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.root)))
        return
    with tempfile.TemporaryDirectory() as cache:
        child(__file__, args.root, "--one", "lab", LAB_CACHE=cache)  # also warms the page cache

        def first() -> dict:
            with tempfile.TemporaryDirectory() as empty:
                return child(__file__, args.root, "--one", "lab", LAB_CACHE=empty)

        contenders = {
            "ImageFolder, 2 workers": lambda: child(__file__, args.root, "--one", "torchvision"),
            "lab, first start": first,
            "lab, second start": lambda: child(
                __file__, args.root, "--one", "lab", LAB_CACHE=cache
            ),
        }
        results = in_turn(contenders, args.rounds, show="seconds")
    print("\n| | seconds | times faster than ImageFolder |\n| --- | --- | --- |")
    for name, rows in results.items():
        faster = spread(ratios(results, "ImageFolder, 2 workers", name, "seconds"))
        print(f"| {name} | {spread([row['seconds'] for row in rows])} | {faster} |")
    write_json(args.json, {"results": results})


if __name__ == "__main__":
    main()
