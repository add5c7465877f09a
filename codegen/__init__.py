"""Code generation: graphs are cut into regions, equal regions are compiled once, and the results are cached."""
