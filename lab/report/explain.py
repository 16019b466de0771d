"""Grad-CAM: which regions of an image raised the score of the class that a model predicts.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization". The package captum, the extra `explain`, computes it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lab.checkpoint import weights as weights_module
from lab.checkpoint.atomic_io import os_errors_as_user_errors, write_atomically
from lab.data.transforms import BatchTransform
from lab.engine.training import to_device
from lab.errors import UserError, install_hint

if TYPE_CHECKING:
    from lab.checkpoint.run_dir import RunDir

POOLING = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d,
)  # fmt: skip
BATCH_SIZE = 8
COLOR_MAP = "turbo"
MAX_OPACITY = 0.6  # of the color at the peak of a heat map
MIN_SIDE = 224  # pixels of an overlay in a file; smaller images are enlarged


class GradCam:
    """Computes heat maps for a model in evaluation mode, whose parameters it freezes.

    `metadata` belongs to the weights of the model. Raises `UserError` if captum is not installed,
    or if the model has no feature map to explain.
    """

    def __init__(self, model: nn.Module, metadata: dict[str, Any]):
        if find_spec("captum") is None:
            raise UserError("--explain needs captum", install_hint("explain"))
        architecture, self.device = metadata["model"], next(model.parameters()).device
        # Without gradients of the parameters, the backward pass ends at the feature map.
        model.eval().requires_grad_(False)
        size = architecture["image_size"]
        layer = find_layer(
            model, torch.zeros(1, architecture["in_chans"], size, size, device=self.device)
        )
        if layer is None:
            raise UserError(
                f"{architecture['name']} has no convolutional feature map near its output, which "
                "Grad-CAM needs",
                "Leave out --explain",
            )
        from captum.attr import LayerGradCam

        self.transform = BatchTransform(metadata["mean"], metadata["std"], (), self.device)
        self.method = LayerGradCam(model, layer)

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return heat maps uint8 [n, h, w] for images uint8 [n, C, H, W] and classes int64 [n].

        255 is the region that raises the logit of the class most, and 0 one that does not raise it.
        h and w are those of the feature map.
        """
        parts = zip(images.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True)
        return torch.cat([self._heatmaps(*part) for part in parts])

    def _heatmaps(self, images: Tensor, classes: Tensor) -> Tensor:
        inputs, classes = self.transform(images.to(self.device)), classes.to(self.device)
        # In float32: the gradients of a mean over many pixels may be too small for float16.
        with torch.autocast(self.device.type, enabled=False):
            maps = self.method.attribute(inputs, classes, relu_attributions=True)  # [n, 1, h, w]
        peaks = maps.amax((1, 2, 3), keepdim=True)
        scaled = 255 * maps / peaks.clamp(min=torch.finfo(maps.dtype).tiny)
        return scaled.detach().round().byte().squeeze(1).cpu()


@torch.no_grad()
def find_layer(model: nn.Module, images: Tensor) -> nn.Module | None:
    """Return the module whose output is the last feature map [n, C, h, w] before global pooling.

    Return None if tokens [n, T, D] follow that map, as in vision transformers: there, attention
    mixes the positions of the map.
    """
    found: nn.Module | None = None
    pooled: list[Tensor] = []  # a container returns the very tensor that its last module returned

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal found
        if not isinstance(output, Tensor):
            return
        if isinstance(module, POOLING):
            pooled.append(output)
        if output.ndim == 3:
            found = None
        is_map = output.ndim == 4 and min(output.shape[2:]) > 1
        if is_map and not any(output is tensor for tensor in pooled):
            found = module

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def load_grad_cam(run: RunDir, device: torch.device) -> GradCam | None:
    """Return Grad-CAM for the best weights of a run; None if it is not available for them.

    The weights are loaded again: hooks and compiled models do not go together.
    """
    if find_spec("captum") is None:
        return None
    metadata = weights_module.read_metadata(run.best)
    model = weights_module.load_model(run.best, metadata)
    try:
        return GradCam(to_device(model, metadata["model"]["name"], device), metadata)
    except UserError:  # the model has no feature map
        return None


def overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Return an image, uint8 [C, H, W], colored by a heat map, uint8 [h, w], as uint8 [3, H, W]."""
    from matplotlib import colormaps

    height, width = image.shape[1:]
    enlarged = Image.fromarray(heatmap).resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(enlarged) / 255
    color = 255 * colormaps[COLOR_MAP](values)[..., :3].transpose(2, 0, 1)
    opacity = MAX_OPACITY * values
    return (opacity * color + (1 - opacity) * image).round().astype(np.uint8)


class OverlayWriter:
    """Writes an overlay for each classified image file into a directory.

    All processes create one, and each writes the overlays of its own images. Below the directory,
    the files have the paths of the images relative to their common directory, with `.png` appended,
    so that no two images have the same one. Raises `UserError` unless the directory is empty or
    missing.
    """

    def __init__(
        self, directory: str, paths: Sequence[str], model: nn.Module, metadata: dict[str, Any]
    ):
        self.grad_cam = GradCam(model, metadata)
        self.files = overlay_files(directory, paths)

    def __call__(self, indices: Sequence[int], images: Tensor, classes: Tensor) -> None:
        """Write the overlays of the images uint8 [n, C, H, W] of the paths at `indices`."""
        factor = -(-MIN_SIDE // images.shape[-1])
        heatmaps = self.grad_cam(images, classes).numpy()
        for i, image, heatmap in zip(indices, images.cpu().numpy(), heatmaps, strict=True):
            pixels = overlay(image.repeat(factor, 1).repeat(factor, 2), heatmap)
            try:
                _write_png(self.files[i], pixels)
            except UserError as error:
                raise UserError(error.what, error.hint, rank_local=True) from error


def _write_png(file: Path, pixels: np.ndarray) -> None:
    with os_errors_as_user_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(content, "PNG")
    write_atomically(file, content.getvalue())


def overlay_files(directory: str, paths: Sequence[str]) -> list[Path]:
    """Return the file of the overlay of each path; see `OverlayWriter`.

    Raises `UserError` unless the directory is empty or missing, so that no file is replaced.
    """
    if os.path.exists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise UserError(
            f"invalid --explain {directory}: it is not an empty directory",
            "Give a new or an empty one",
        )
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute]) if paths else ""
    return [Path(directory, os.path.relpath(path, common) + ".png") for path in absolute]
