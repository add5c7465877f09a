"""DeepSpeed's engine on this compiler: its configuration, and the object that trains a model as that says."""
