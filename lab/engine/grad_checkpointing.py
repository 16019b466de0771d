"""Gradient checkpointing: recompute the activations of a model's blocks in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". PyTorch saves and restores the
random state of dropout and the precision of autocast. It does not prevent BatchNorm from updating
its running statistics again, which `_copied_buffers` does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lab.errors import UserError


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Make each block of the model save its inputs only, in place.

    Raises `UserError` if the model, whose name is `name`, has no blocks.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise UserError(
            f"--grad-checkpointing: {name} has no blocks of layers to recompute",
            "Leave it out, and save memory with --grad-accum-steps",
        )
    for block in blocks:
        # An instance attribute, so that the names of the weights stay those of the plain model;
        # copies of the model get their own.
        block.forward = partial(_checkpointed, block.forward)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the modules with layers of their own that a list of modules contains.

    These are the residual blocks of a ResNet or the encoder blocks of a transformer. Of nested
    lists, as in a stage that is a module with a list of blocks, the inner one counts.
    """
    found = []
    for child in module.children():
        inner = find_blocks(child)
        is_listed = _is_list(module) and not _is_list(child)
        is_block = is_listed and any(child.children()) and len(inner) < 2
        found += [child] if is_block else inner
    return found


def _is_list(module: nn.Module) -> bool:
    """Return whether a module is one of PyTorch's lists, or has children of one class only."""
    children = [*module.children()]
    same_class = len({*map(type, children)}) == 1 and any(children[0].children())
    return isinstance(module, (nn.Sequential, nn.ModuleList)) or same_class


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block's original `forward`, a bound method, and save its inputs only."""
    block = forward.__self__  # type: ignore[attr-defined]
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # DenseNet extends the list that it gives to its layers before they are called again.
    args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)

    def contexts() -> tuple[Any, Any]:  # of the forward pass, and of its repetition
        return nullcontext(), _copied_buffers(block)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    """Let the layers of a block update copies of their buffers, which are discarded."""
    buffers = [
        (layer, name, buffer)
        for layer in block.modules()
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    for layer, name, buffer in buffers:
        setattr(layer, name, buffer.clone())
    try:
        yield
    finally:
        for layer, name, buffer in buffers:
            setattr(layer, name, buffer)
