"""What learning means: data, losses, updates, checkpoints. Knows no requests and no jobs."""
