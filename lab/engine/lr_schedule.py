"""Learning rate as a pure function of the step."""

import math

from lab.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0 over the whole run.

    It rises linearly for `warmup_epochs`. The schedule `constant` then keeps it; `step` multiplies
    it by `lr_gamma` every `lr_step_epochs`; `cosine` (Loshchilov, Hutter 2017, without restarts)
    and `linear` lower it to 0 at the end of `epochs`, even if `max_steps` ends the run earlier.

    Accelerate's wrapped schedulers would advance once for each process.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.lr_gamma ** (step // steps_per_epoch // config.lr_step_epochs)
    total_steps = config.epochs * steps_per_epoch
    progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    progress = min(1.0, max(0.0, progress))
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (1 - progress)
