"""The optimizer, and the learning rate as a pure function of the step."""

import math

from lab.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0 over the whole run.

    Accelerate's wrapped schedulers advance once a process; a function of the step cannot.
    After `warmup_epochs` of linear rise: `constant`; `step`, times `lr_gamma` every
    `lr_step_epochs`; `cosine`, to 0 at the end (Loshchilov, Hutter 2017, without restarts);
    `linear`, linearly to 0 (Smith, Topin 2018, one triangle). The end is that of `epochs`,
    whether or not `max_steps` comes before it.
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
