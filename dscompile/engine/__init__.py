"""The training engine: what a DeepSpeed-style script needs around the compiler."""
