"""What a program would cost on a TPU, by the TPU compiler's own estimates, without a TPU."""
