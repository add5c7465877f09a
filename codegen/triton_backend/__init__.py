"""Tiles as Triton source, built ahead of time for any target, or run. Importing this imports no triton."""
