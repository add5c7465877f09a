"""Attention for CPUs in C++: the source, its builder, and the choice of when to use it."""
