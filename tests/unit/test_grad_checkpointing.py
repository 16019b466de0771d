"""`--grad-checkpointing` saves memory and changes neither the weights nor the BatchNorm buffers."""

import pytest
import torch
from torch import nn

from lab.config.recipes import resolve
from lab.data.types import Batch
from lab.distributed import build_accelerator
from lab.engine.ema import ModelEma
from lab.engine.grad_checkpointing import checkpoint_gradients, find_blocks
from lab.engine.optimizer import build_optimizer
from lab.engine.training import TrainStep, configure_model, seed_dropout
from lab.errors import UserError
from lab.models import build_model

SHAPE = {"num_classes": 4, "in_chans": 3, "image_size": 32}
MODELS = {  # BatchNorm with stochastic depth, dense blocks, auxiliary classifiers, dropout
    "efficientnet_b0": {},
    "densenet": {},
    "googlenet": {},
    "vit_tiny": {"dropout": 0.2},
}


def train(model_name: str, settings: dict, grad_checkpointing: bool) -> tuple[dict, int]:
    """Return the weights and the average of the weights after two steps, and the bytes saved."""
    config = resolve(
        {"model": model_name, "dataset": "digits", "lr": 0.1, "ema_decay": 0.5, **settings}
        | {"grad_checkpointing": grad_checkpointing, "grad_accum_steps": 2}
    )
    accelerator = build_accelerator(mixed_precision="no", threads=1)
    torch.manual_seed(0)
    model = configure_model(build_model(model_name, **SHAPE), config, accelerator.device)
    ema = ModelEma(model, config.ema_decay)
    optimizer = build_optimizer(model, config, accelerator)
    step = TrainStep(accelerator, config, model, accelerator.prepare(model), optimizer, ema)
    step.set_training_mode()
    for number in range(2):
        images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
        seed_dropout(number, accelerator.device)
        assert step(Batch(images, labels, labels, 8)) is not None
        ema.update(model, number + 1)
    ema.module.eval()
    with torch.no_grad():  # the copy has blocks of its own
        logits = ema.module(torch.ones(1, 3, 32, 32))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {**weights, "logits of the average": logits}, saved_bytes(model)


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of the activations that a forward pass saves for the backward pass."""
    saved = {}  # also keeps the storages, whose addresses would be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(8, 3, 32, 32))
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("name", MODELS)
def test_p2_the_same_steps_with_less_memory(name):
    plain, plain_bytes = train(name, MODELS[name], grad_checkpointing=False)
    recomputed, recomputed_bytes = train(name, MODELS[name], grad_checkpointing=True)
    assert recomputed.keys() == plain.keys()  # P5: the names are those of the plain model
    for key in plain:  # BatchNorm's running statistics and counts, too
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-5, atol=1e-6, msg=key)
    assert recomputed_bytes < 0.85 * plain_bytes


def test_blocks_of_nested_stages_are_those_of_the_innermost_list():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    class Stage(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(depth)])

    model = nn.Sequential(Block(), nn.ModuleList([Stage(2), Stage(1)]), nn.Linear(2, 2))
    assert [type(block) for block in find_blocks(model)] == [Block] * 4


def test_p7_a_model_without_blocks_and_compile_are_refused():
    with pytest.raises(UserError) as error:
        checkpoint_gradients(build_model("lenet5", **SHAPE), "lenet5")
    assert str(error.value).startswith("--grad-checkpointing: lenet5 has no blocks of layers")
    with pytest.raises(UserError, match="--grad-checkpointing cannot be combined with --compile"):
        resolve({"grad_checkpointing": True, "compile": True})
