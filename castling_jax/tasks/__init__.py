"""What a model learns: for each task its losses, targets and measures."""
