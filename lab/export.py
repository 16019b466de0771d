"""Export saved weights to a file that runs without lab: ONNX, or a program of torch.export."""

import io
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.checkpoint.atomic_io import check_output_file
from lab.checkpoint.provenance import versions
from lab.data import DataConfig
from lab.data.transforms import BatchTransform
from lab.errors import UserError, first_line, install_hint

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
EXTRA = ("onnx", "onnxscript", "onnxruntime")  # the extra `onnx` of pyproject.toml
KEY = "lab"  # of the metadata in an ONNX file; torch.export: an extra file, lab.json
DESCRIBED = ("class_names", "model", "mean", "std", "temperature", "best_epoch")  # of the metadata
INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"

# Largest difference allowed, relative to the largest logit: 1000 roundings of float32, because
# runtimes add in different orders. lab's models and seven of torchvision's, with random weights,
# stayed below 2 % of it.
TOLERANCE = 1000 * 2**-23


class ExportedModel(nn.Module):
    """A model that normalizes its input and calibrates its logits, optionally with a softmax."""

    scale: Tensor  # [C, 1, 1]
    shift: Tensor

    def __init__(self, model: nn.Module, metadata: dict[str, Any], softmax: bool):
        super().__init__()
        plain = BatchTransform(metadata["mean"], metadata["std"], (), "cpu")
        self.register_buffer("scale", plain.scale)
        self.register_buffer("shift", plain.shift)
        self.model, self.softmax = model, softmax
        self.temperature = metadata["temperature"]

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 [n, K] for uint8 [n, C, H, W]."""
        logits = self.model(images.float() * self.scale + self.shift)
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits.softmax(1) if self.softmax else logits


def describe(metadata: dict[str, Any], *, dynamic_batch: bool, softmax: bool) -> dict:
    """Return the description in the file: its input, its output, and the weights' metadata."""
    architecture, data = metadata["model"], DataConfig(**metadata["data"])
    batch, size = "batch" if dynamic_batch else 1, architecture["image_size"]
    return {
        "input": {
            "name": INPUT,
            "dtype": "uint8",  # 0 to 255; the model normalizes it
            "shape": [batch, architecture["in_chans"], size, size],
            "fit": data.fit,  # after rotation according to the EXIF data
            "crop_pct": data.crop_pct,
            "resize": f"{data.interpolation}, antialiased",
        },
        "output": {
            "name": PROBABILITIES if softmax else LOGITS,
            "dtype": "float32",
            "shape": [batch, architecture["num_classes"]],
        },
        "arithmetic": "float32",
        **{name: metadata[name] for name in DESCRIBED},
        "metrics": metadata.get("metrics", {}),
        "weights_sha256": metadata.get("sha256", ""),
        "versions": versions(),
    }


def pack(
    model: nn.Module, metadata: dict[str, Any], kind: str, description: dict[str, Any]
) -> bytes:
    """Return the content of an "onnx" or "torch-export" file as `description` describes it.

    `model` is on the CPU. Raises `UserError` if packages are missing, or if the model cannot be
    exported.
    """
    if kind == "onnx":
        check_extra()
    exported = ExportedModel(model, metadata, description["output"]["name"] == PROBABILITIES).eval()
    batch, *shape = description["input"]["shape"]
    dynamic = batch == "batch"
    # Two images, because torch.export specializes a batch of one to that size.
    example = torch.zeros(2 if dynamic else 1, *shape, dtype=torch.uint8)
    dimensions = {0: torch.export.Dim("batch", min=1)} if dynamic else {}
    logging.disable(logging.ERROR)  # PyTorch logs pages if it cannot trace a model
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # ... and prints
            program = torch.export.export(exported, (example,), dynamic_shapes=(dimensions,))
        if kind == "onnx":
            return _onnx(program, dimensions, description)
        return _pt2(program, description)
    except Exception as error:  # of many types, depending on the model
        raise UserError(
            f"{metadata['model']['name']} cannot be exported ({first_line(error)})",
            "Try the other --format, or leave out --dynamic-batch",
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _pt2(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # contains paths of this machine
    # torch.export.save pickles only these; without them it writes tensors and JSON.
    program.example_inputs = None
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{KEY}.json": json.dumps(description)})
    return content.getvalue()


def _onnx(program: torch.export.ExportedProgram, dimensions: dict, description: dict) -> bytes:
    exported = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[description["output"]["name"]],
        dynamic_shapes=(dimensions,) if dimensions else None,  # names the batch dimension
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    nodes = [node for part in (model.graph, *model.functions) for node in part.node]
    for part in (*nodes, *model.graph.value_info, *model.functions, model.graph):
        del part.metadata_props[:]  # stack traces, with paths of this machine
    model.metadata_props.add(key=KEY, value=json.dumps(description))
    return model.SerializeToString()


def check_extra() -> None:
    """Raise `UserError` if a package that the ONNX export needs is missing."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}", install_hint("onnx"))


def load(content: bytes, kind: str) -> Callable[[Tensor], Tensor]:
    """Return the function that an exported file computes, run on the CPU by its own runtime.

    Raises `UserError` if ONNX Runtime cannot run the file.
    """
    if kind == "torch-export":
        return torch.export.load(io.BytesIO(content)).module()

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many types, depending on the model
        raise UserError(
            f"ONNX Runtime cannot run the model ({first_line(error)})", "Try --format torch-export"
        ) from error
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


@torch.no_grad()
def largest_difference(
    run: Callable[[Tensor], Tensor],
    description: dict[str, Any],
    model: nn.Module,
    transform: BatchTransform,
    batch_sizes: Sequence[int],
) -> tuple[float, float]:
    """Return the largest difference between the outputs of `run` and `model`, and its bound.

    `model` (float32, on the CPU) and `transform` are those of evaluation. The difference is
    infinite if an output is not finite or has another shape.
    """
    largest = bound = 0.0
    model.eval()
    for number, n in enumerate(batch_sizes):
        images = synthetic_images(n, description["input"]["shape"][1:], seed=number)
        expected = model(transform(images)).float() / description["temperature"]
        # A small difference of logits changes a probability by at most half as much.
        bound = max(bound, TOLERANCE * max(1.0, expected.abs().max().item()))
        if description["output"]["name"] == PROBABILITIES:
            expected = expected.softmax(1)
        outputs = run(images)
        if outputs.shape != expected.shape or not bool(outputs.isfinite().all()):
            return float("inf"), bound
        largest = max(largest, (outputs - expected).abs().max().item())
    return largest, bound / 2 if description["output"]["name"] == PROBABILITIES else bound


def synthetic_images(num: int, shape: Sequence[int], seed: int) -> Tensor:
    """Return uint8 [num, C, H, W] with the value range and smoothness of natural images.

    The first image is uniform noise.
    """
    generator = torch.Generator().manual_seed(seed)
    in_chans, *size = shape
    smooth = F.interpolate(
        torch.rand(num, in_chans, 4, 4, generator=generator), size, mode="bicubic"
    )
    images = smooth + 0.05 * torch.randn(num, *shape, generator=generator)
    images[0] = torch.rand(*shape, generator=generator)
    return (255 * images.clamp(0, 1)).round().to(torch.uint8)


def check_writable(output: Path, weights: Path) -> None:
    """Raise `UserError` if the file would replace the weights, or cannot be written."""
    if output.exists() and output.samefile(weights):
        raise UserError(f"--output {output} is the file of the weights", "Give another file")
    check_output_file("--output", output)
