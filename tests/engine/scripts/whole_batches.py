"""A training script for DeepSpeed that hands over whole batches: train_batch and eval_batch, no pipeline."""

import json
import os

import deepspeed
import torch
from torch import nn

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
        self.loss_fn = nn.MSELoss()

    def forward(self, x):
        return self.layers(x)


def micro_batches(rank, world, count):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(4 * world, 10, generator=generator)
        y = x[:, :3].sum(1, keepdim=True)
        yield x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]


def main():
    deepspeed.init_distributed()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = Model()
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    rank, world = engine.global_rank, engine.world_size
    data = micro_batches(rank, world, 20)
    losses = [engine.train_batch(data_iter=data).item() for _ in range(10)]
    held_out = engine.eval_batch(data_iter=micro_batches(rank, world, 2)).item()
    with deepspeed.zero.GatheredParameters(engine.module.layers[0].weight, modifier_rank=0):
        if rank == 0:
            engine.module.layers[0].weight.fill_(0.25)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        filled = engine.module.layers[0].weight.detach().unique().tolist()
    if rank == world - 1:
        with open(os.environ["RESULT"], "w") as file:
            json.dump({"losses": losses, "held_out": held_out, "steps": engine.global_steps, "filled": filled}, file)


if __name__ == "__main__":
    main()
