"""Between two log lines, no operation of a training step makes the host wait for the device.

Checked on a CPU by the operations called; tests/gpu/test_gpu.py checks it on a GPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import VARIANTS, make_loader, make_train_step, place, train

from lab.engine.training import seed_dropout

WAITS = {  # operations whose result or its shape the host reads from the device
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::bincount",
    "aten::_unique2",
    "aten::lift_fresh",  # copies Python numbers to the device
}


class Waits(TorchDispatchMode):
    """Record the operations for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITS or by_mask:
            self.recorded.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model", "settings"), [("alexnet", {}), *(("lenet5", settings) for settings in VARIANTS[1:])]
)
def test_a_step_reads_the_device_only_to_log(model, settings):
    cpu = place("cpu")
    loader = make_loader(cpu, model)
    rarely, often = (make_train_step(cpu, model, log_every=n, **settings) for n in (10**9, 2))
    rows = []
    with Waits() as waits:
        train(rarely, loader)
    assert waits.recorded == []
    with Waits() as waits:
        train(often, loader, on_log=rows.append)
    assert waits.recorded == ["aten::_local_scalar_dense"] * len(rows) == waits.recorded[:2]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: bool((x > 0).all()),
    ],
)
def test_waiting_operations_are_recorded(wait):
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.recorded


def test_seed_dropout_equals_torch_manual_seed():
    torch.manual_seed(123)
    expected = torch.rand(5)
    seed_dropout(123, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
