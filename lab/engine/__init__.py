"""Training and evaluation: one epoch, the training step, metrics, optimizer, LR schedule."""
