"""Replayed: work that a GPU does over and over, recorded as a CUDA graph and sent to it whole.

A training step is 60 kernels and more, and a host needs longer to send them one by one than a GPU
to compute them, unless network or batch are large (benchmarks/RESULTS.md).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lab.errors import UserError

NUM_WARMUP_CALLS = (
    3  # calls that are not recorded: they choose kernels, compile, make optimizer states
)


class CUDAGraphRunner:
    """`function`, from tensors of one GPU to a tensor there, replayed once it was warmed up.

    A recording is kept for each combination of shapes. It holds what the function read on its way,
    weights and buffers, by address: they are to be changed in place. Random numbers are drawn anew
    at each replay, from the generator's seed. The function may not wait for the device, nor take
    another way from one call to the next.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function returns, in memory of its own. Raises `UserError`."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.graphs:
            self.calls[shapes] += 1
            if self.calls[shapes] <= NUM_WARMUP_CALLS:
                return self.function(*inputs)
            self.graphs[shapes] = self._record(inputs)
        graph, static_inputs, result = self.graphs[shapes]
        for place, tensor in zip(static_inputs, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return result.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, Any, Tensor]:
        graph, static_inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        # Recordings share memory: one is replayed at a time, and its result copied at once.
        pool = next((old.pool() for old, *_ in self.graphs.values()), None)
        try:
            # Other threads, which write states and pin batches, may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = self.function(*static_inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]})",
                "Give --cuda-graphs never",
            ) from error
        return graph, static_inputs, result
