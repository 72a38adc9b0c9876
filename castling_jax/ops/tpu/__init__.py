"""Private: the Pallas kernels for TPUs behind `implementation="pallas"`. On a CPU they are interpreted."""
