"""Export saved weights to one file that runs without lab, and compare it with the model.

  python export.py runs/lenet5-mnist                     best.onnx beside the weights
  python export.py best.safetensors --dynamic-batch --softmax --output model.onnx
  python export.py best.safetensors --format torch-export

ONNX needs `pip install -e '.[onnx]'`. The input is uint8 [N, C, H, W], 0 to 255, which the exported
model normalizes; N is 1 without --dynamic-batch. The output is float32 [N, K]. The metadata, as
JSON, contain the name and shape of input and output, the class names and more; docs/training.md
lists the keys. Prepare images as lab does: rotate them according to their EXIF data, crop a part
of the central square, and resize it with an antialiased filter (for `--fit crop`):

    import numpy as np
    from PIL import Image, ImageOps

    def prepare(path, description):
        _, channels, height, width = description["input"]["shape"]
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("L" if channels == 1 else "RGB")
        side = round(min(image.size) * description["input"]["crop_pct"])
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
        filter = description["input"]["resize"].split(",")[0].upper()  # BILINEAR or BICUBIC
        image = image.resize((width, height), Image.Resampling[filter])
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)

With ONNX Runtime:

    import json
    import onnxruntime

    session = onnxruntime.InferenceSession("best.onnx")
    description = json.loads(session.get_modelmeta().custom_metadata_map["lab"])
    images = np.stack([prepare(path, description) for path in paths])
    [outputs] = session.run(None, {description["input"]["name"]: images})
    names = [description["class_names"][k] for k in outputs.argmax(1)]

With PyTorch:

    import json
    import torch

    extra = {"lab.json": ""}
    model = torch.export.load("best.pt2", extra_files=extra).module()
    description = json.loads(extra["lab.json"])
    images = np.stack([prepare(path, description) for path in paths])
    outputs = model(torch.from_numpy(images))
    names = [description["class_names"][k] for k in outputs.argmax(1)]

Neither file contains a pickle. However, torch.export.load can unpickle: do not load a .pt2 file
that you do not trust. Future versions of PyTorch may not read a .pt2, so keep the weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from lab import console
from lab.checkpoint.atomic_io import write_atomically
from lab.config.cli import parse_arguments
from lab.config.schema import (
    DEBUG,
    OWN_MODEL,
    REPORT,
    THREADS,
    TRAINED_WEIGHTS,
    check_fields,
    check_output,
    option,
)
from lab.errors import UserError, run_script


@dataclass(frozen=True)
class ExportConfig:
    """The settings of an export."""

    # fmt: off
    weights: str = TRAINED_WEIGHTS()
    model: str = OWN_MODEL()
    format: str = option("onnx", REPORT,
        "onnx, or a program of torch.export (.pt2)", choices=("onnx", "torch-export"))
    dynamic_batch: bool = option(False, REPORT, "accept any number of images instead of one")
    softmax: bool = option(False, REPORT, "return probabilities instead of logits")
    output: str = option("", REPORT,
        "file to write; default: beside the weights, as .onnx or .pt2", metavar="FILE")
    threads: int = THREADS()
    debug: bool = DEBUG(group=REPORT)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        check_output(self.weights, self.output)


def main(argv: list[str] | None = None) -> None:
    """Export weights as the command line `argv` says. Raises `UserError`."""
    config = ExportConfig(
        **parse_arguments(ExportConfig, argv, prog="export.py", description=__doc__)
    )

    # Importing PyTorch takes seconds: --help and command-line mistakes are answered before.
    import torch

    from lab import export
    from lab.checkpoint import weights
    from lab.data.transforms import BatchTransform
    from lab.distributed import default_threads

    # Weights
    path = weights.find_weights(config.weights)
    metadata = weights.read_metadata(path, config.model)
    output = (
        Path(config.output) if config.output else path.with_suffix(export.SUFFIXES[config.format])
    )
    formats = {suffix: name for name, suffix in export.SUFFIXES.items()}
    if (named := formats.get(output.suffix, config.format)) != config.format:
        raise UserError(
            f"--output {output} ends in {output.suffix}, but --format is {config.format}",
            f"Add --format {named}",
        )
    export.check_writable(output, path)

    # Model
    torch.set_num_threads(config.threads or default_threads())
    model = weights.load_model(path, metadata)
    description = export.describe(
        metadata, dynamic_batch=config.dynamic_batch, softmax=config.softmax
    )

    # Export, and comparison with the model
    with console.status(f"exporting {metadata['model']['name']}"):
        content = export.pack(model, metadata, config.format, description)
        difference, bound = export.largest_difference(
            export.load(content, config.format),
            description,
            model,
            BatchTransform(metadata["mean"], metadata["std"], (), "cpu"),
            batch_sizes=(1, 2, 3, 8) if config.dynamic_batch else (1,) * 4,
        )
    if difference > bound:
        raise UserError(
            f"the outputs of the exported file differ by {difference:.1e}, more than {bound:.1e}, "
            "from those of the model; it is not written",
            "Try the other --format",
        )
    write_atomically(output, content)
    console.print_line(f"largest difference from the model: {difference:.1e} (bound: {bound:.1e})")
    console.print_line(f"wrote {output}, {len(content) / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(run_script(main))
