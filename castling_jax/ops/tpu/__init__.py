"""Private: Pallas kernels for TPUs behind `implementation="pallas"`; on a CPU they are interpreted."""
