"""Code generation: a graph is cut into regions, equal regions are compiled once, and the compiled results are cached."""
