"""What a run leaves on the disk: checkpoints, logs, its report."""
