"""A training script for DeepSpeed: arguments, a dataset, the plain loop, a checkpoint and going on from it."""

import argparse
import json
import os

import deepspeed
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layers(x), y)


def dataset():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 10, generator=generator)
    return TensorDataset(x, x[:, :3].sum(1, keepdim=True))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save", type=str, required=True)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(1)
    model = Net()
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=dataset()
    )
    losses = []
    for epoch in range(args.epochs):
        for x, y in loader:
            loss = engine(x.to(engine.device), y.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.save_checkpoint(args.save, tag=f"epoch{epoch}", client_state={"epoch": epoch})

    torch.manual_seed(2)
    again, _, _, _ = deepspeed.initialize(
        args=args, model=(fresh := Net()), model_parameters=fresh.parameters(), training_data=dataset()
    )
    path, client_state = again.load_checkpoint(args.save)
    x, y = next(iter(loader))
    again.eval()
    engine.eval()
    with torch.no_grad():
        mine, other = (e(x.to(e.device), y.to(e.device)) for e in (engine, again))
        same = torch.equal(mine, other)
    if engine.global_rank == 0:
        with open(os.environ["RESULT"], "w") as file:
            json.dump(
                {
                    "losses": losses,
                    "steps": engine.global_steps,
                    "loaded": os.path.basename(path),
                    "epoch": client_state["epoch"],
                    "loaded_steps": again.global_steps,
                    "same": same,
                    "zero": engine.zero_optimization_stage(),
                },
                file,
            )


if __name__ == "__main__":
    main()
