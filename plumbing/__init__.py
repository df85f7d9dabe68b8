"""What every trainer needs and nobody reads first: ranks, checkpoints, packing, logs, flags."""
