"""Training runs: steps, records, checkpoints and exact resumption."""
