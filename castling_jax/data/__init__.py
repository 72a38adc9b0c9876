"""Examples, from their source to batches."""
