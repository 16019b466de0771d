"""A function that is captured as a CUDA graph and replayed.

A training step launches 60 kernels or more. Unless the model or the batch is large, the host takes
longer to launch them one by one than the GPU to run them (benchmarks/RESULTS.md).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lab.errors import UserError, first_line

# Calls before the capture, which select kernels, compile and allocate the optimizer state.
NUM_WARMUP_CALLS = 3


def can_capture_steps(accelerator: Any, config: Any) -> bool:
    """Return whether training steps with a `TrainConfig` can be captured as CUDA graphs.

    Capturing is impossible if the host reads the gradients or, for gradient checkpointing, the
    state of the random number generator. It is used on one GPU only: gloo's collectives cannot be
    captured, and NCCL's were not tested.
    """
    reads_gradients = accelerator.scaler is not None or config.on_nonfinite == "skip"
    waits = reads_gradients or config.grad_checkpointing
    one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return config.cuda_graphs == "auto" and one_gpu and not waits


class CUDAGraphRunner:
    """Call a function of tensors on one GPU, and replay it as a CUDA graph after the warmup.

    Inputs are tensors or None. There is one graph for each combination of their shapes. A graph
    accesses the weights and buffers that the function uses by address, so they may only be changed
    in place. Each replay draws new random numbers from the generator's current seed. The function
    may not wait for the device, and must run the same kernels in each call.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Return the function's result, a new tensor. Raises `UserError` if the capture fails."""
        shapes = tuple(None if tensor is None else tensor.shape for tensor in inputs)
        if shapes not in self.graphs:
            self.calls[shapes] += 1
            if self.calls[shapes] <= NUM_WARMUP_CALLS:
                return self.function(*inputs)
            self.graphs[shapes] = self._capture(inputs)
        graph, static_inputs, result = self.graphs[shapes]
        for static_input, tensor in zip(static_inputs, inputs, strict=True):
            if static_input is not None and tensor is not None:
                static_input.copy_(tensor, non_blocking=True)
        graph.replay()
        return result.clone()

    def _capture(
        self, inputs: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, Any, Tensor]:
        graph = torch.cuda.CUDAGraph()
        static_inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        # Graphs share memory, as one is replayed at a time and its result is copied at once.
        pool = next((old.pool() for old, *_ in self.graphs.values()), None)
        try:
            # Other threads, which write checkpoints and pin batches, may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = self.function(*static_inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"the step cannot be captured as a CUDA graph ({first_line(error)})",
                "Give --cuda-graphs never",
            ) from error
        return graph, static_inputs, result
