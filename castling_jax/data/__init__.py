"""Images and labels, from their source to batches."""
