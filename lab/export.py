"""Saved weights as a file that runs without lab: ONNX, or a program of torch.export."""

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

from lab.checkpoint.atomic_io import check_output_file, write_atomically
from lab.checkpoint.provenance import versions
from lab.data.transforms import BatchTransform
from lab.errors import UserError

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
EXTRA = ("onnx", "onnxscript", "onnxruntime")  # what the extra `onnx` of pyproject.toml installs
KEY = "lab"  # of the metadata in an ONNX file; with .json, in a program of torch.export
INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
ONNX_BYTES = 2**31 - 2**20  # protobuf's limit for one file, less what the graph takes

# How far an output may be off, as a share of the largest logit. Runtimes sum in other orders: a
# thousand roundings of float32 (2^-23), twenty of float16 (2^-10). The networks of lab, and seven
# of torchvision's, with random weights, stayed below a fiftieth and a quarter of that.
SHARE = {torch.float32: 1000 * 2**-23, torch.float16: 20 * 2**-10}


class Packed(nn.Module):
    """A network with its normalisation before it, and softmax after it if that is asked for."""

    scale: Tensor  # [C, 1, 1]
    shift: Tensor

    def __init__(
        self, model: nn.Module, metadata: dict[str, Any], dtype: torch.dtype, softmax: bool
    ):
        super().__init__()
        plain = BatchTransform(metadata["mean"], metadata["std"], (), "cpu")
        self.register_buffer("scale", plain.scale)
        self.register_buffer("shift", plain.shift)
        self.model, self.dtype, self.softmax = model.to(dtype), dtype, softmax

    def forward(self, images: Tensor) -> Tensor:
        """float32 [n, K] of uint8 [n, C, H, W]; normalised in float32, whatever the network's."""
        scaled = images.float() * self.scale + self.shift
        logits = self.model(scaled.to(self.dtype)).float()
        return logits.softmax(1) if self.softmax else logits


def describe(metadata: dict[str, Any], *, dynamic_batch: bool, half: bool, softmax: bool) -> dict:
    """What the file says of itself: what to give it, what it returns, and of what weights it is.

    `info` is the weights' metadata.
    """
    architecture = metadata["model"]
    batch = "batch" if dynamic_batch else 1
    return {
        "input": {
            "name": INPUT,
            "dtype": "uint8",  # 0 ... 255; normalisation is in the file
            "shape": [
                batch,
                architecture["in_chans"],
                architecture["image_size"],
                architecture["image_size"],
            ],
            "crop": "central square",  # of an image turned as its EXIF data say
            "resize": "bilinear, antialiased",
        },
        "output": {
            "name": PROBABILITIES if softmax else LOGITS,
            "dtype": "float32",
            "shape": [batch, architecture["num_classes"]],
        },
        "arithmetic": "float16" if half else "float32",
        **{name: metadata[name] for name in ("class_names", "model", "mean", "std", "best_epoch")},
        "metrics": metadata.get("metrics", {}),
        "weights_sha256": metadata.get("sha256", ""),
        "versions": versions(),
    }


def pack(
    model: nn.Module, metadata: dict[str, Any], kind: str, description: dict[str, Any]
) -> bytes:
    """The content of the file, "onnx" or "torch-export", that is as `description` describes it.

    `network` is on the CPU, with the weights whose metadata is `info`; it is changed to float16
    where `description` says so. Raises `UserError` where the libraries are missing, and for a network too
    large for the format.
    """
    if kind == "onnx":
        check_extra()
    dtype = getattr(torch, description["arithmetic"])
    packed = Packed(model, metadata, dtype, description["output"]["name"] == PROBABILITIES).eval()
    batch, *shape = description["input"]["shape"]
    dynamic = batch == "batch"
    num_bytes = sum(tensor.nbytes for tensor in packed.state_dict().values())
    if kind == "onnx" and num_bytes > ONNX_BYTES:
        raise UserError(
            f"an ONNX file holds 2 GB, and these weights take {num_bytes / 1e9:.1f}",
            "Give --half or --format torch-export",
        )
    # Two images: one would be taken for a size that never changes.
    example = torch.zeros(2 if dynamic else 1, *shape, dtype=torch.uint8)
    dimensions = {0: torch.export.Dim("batch", min=1)} if dynamic else {}
    logging.disable(logging.ERROR)  # pages of PyTorch's, where it cannot follow a network
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # ... and its print
            program = torch.export.export(packed, (example,), dynamic_shapes=(dimensions,))
        return (
            _onnx(program, dimensions, description)
            if kind == "onnx"
            else _pt2(program, description)
        )
    except Exception as error:  # of many kinds: torchvision's networks are written in many ways
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"{metadata['model']['name']} cannot be exported ({reason})",
            "Try the other --format, or leave --dynamic-batch or --half out",
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _pt2(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
    # They alone are pickled by torch.export.save; without them it writes tensors' bytes and JSON.
    program.example_inputs = None
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{KEY}.json": json.dumps(description)})
    return content.getvalue()


def _onnx(program: torch.export.ExportedProgram, dimensions: dict, description: dict) -> bytes:
    exported = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[description["output"]["name"]],
        dynamic_shapes=(dimensions,) if dimensions else None,  # for the name of the batch
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    nodes = [node for part in (model.graph, *model.functions) for node in part.node]
    for part in (*nodes, *model.graph.value_info, *model.functions, model.graph):
        del part.metadata_props[:]  # the lines of this machine's files that an operator came from
    model.metadata_props.add(key=KEY, value=json.dumps(description))
    return model.SerializeToString()


def check_extra() -> None:
    """Nothing; raises `UserError` where a library that ONNX takes is missing."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}",
            "Run pip install -e '.[onnx]' in lab's checkout",
        )


def load(content: bytes, kind: str, half: bool) -> Callable[[Tensor], Tensor]:
    """What an exported file computes, by the library that is to run it, on the CPU."""
    if kind == "torch-export":
        return torch.export.load(io.BytesIO(content)).module()

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if half:
        # The pass after it reads a null pointer in float16 transformers, on x86
        # (https://github.com/microsoft/onnxruntime/issues/28392; seen with 1.32).
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


@torch.no_grad()
def largest_difference(
    run: Callable[[Tensor], Tensor],
    description: dict[str, Any],
    model: nn.Module,
    transform: BatchTransform,
    batch_sizes: Sequence[int],
) -> tuple[float, float]:
    """(the largest difference of an exported file's output to the network's, its bound).

    `network`, float32 on the CPU, and `preprocess` are evaluation's own. An output that is not
    finite, or of another shape, is infinitely far off.
    """
    share = SHARE[getattr(torch, description["arithmetic"])]
    largest = bound = 0.0
    model.eval()
    for number, n in enumerate(batch_sizes):
        images = pictures(n, description["input"]["shape"][1:], seed=number)
        expected = model(transform(images)).float()
        # Below 1, a difference of logits hardly moves a probability: a half of it at most.
        bound = max(bound, share * max(1.0, expected.abs().max().item()))
        if description["output"]["name"] == PROBABILITIES:
            expected = expected.softmax(1)
        found = run(images)
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            return float("inf"), bound
        largest = max(largest, (found - expected).abs().max().item())
    return largest, bound / 2 if description["output"]["name"] == PROBABILITIES else bound


def pictures(num: int, shape: Sequence[int], seed: int) -> Tensor:
    """uint8 [num, C, H, W] like photographs: smooth shapes, some grain, all of the range.

    The first is noise from black to white.
    """
    generator = torch.Generator().manual_seed(seed)
    in_chans, *size = shape
    smooth = F.interpolate(
        torch.rand(num, in_chans, 4, 4, generator=generator), size, mode="bicubic"
    )
    images = smooth + 0.05 * torch.randn(num, *shape, generator=generator)
    images[0] = torch.rand(*shape, generator=generator)
    return (255 * images.clamp(0, 1)).round().to(torch.uint8)


def write(path: Path, content: bytes) -> None:
    """Writes the file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def check_writable(output: Path, weights: Path) -> None:
    """Nothing; raises `UserError` where the file would replace the weights, or has no folder."""
    if output.exists() and output.samefile(weights):
        raise UserError(f"--output {output} is the weights' own file", "Give another name")
    check_output_file("--output", output)
