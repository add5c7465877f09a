"""Kernels that fusion does not find: attention over a sparse layout, and the loss over a vocabulary."""
