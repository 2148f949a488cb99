"""Many jobs in one process, on one frozen base: only forward and backward are shared."""
