"""DeepSpeed's engine: its configuration, optimizers, schedules, data, checkpoints and monitors, over the compiler."""
