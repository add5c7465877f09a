"""The runtime: executes a Program, a linear list of steps that prints as the Python that runs."""
