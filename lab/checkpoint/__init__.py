"""What a run writes: its directory, weights, checkpoints to resume from, atomic file writes."""
