"""Tiles: a small kernel language with symbolic indices, and the fusion of FX graphs into it. Knows no backend."""
