"""A training script for DeepSpeed: fp16, gradient accumulation, a schedule and a configuration in the script."""

import json
import os

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

CONFIG = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"},
    },
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 1000, "hysteresis": 2},
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "steps_per_print": 5,
    "wall_clock_breakdown": False,
}


def main():
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    engine, _, _, scheduler = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=CONFIG
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses, boundaries, rates = [], [], []
    for _ in range(60):
        x = torch.randn(engine.train_micro_batch_size_per_gpu(), 10, generator=generator)
        y = x[:, :3].sum(1, keepdim=True)
        out = engine(x.half())
        loss = nn.functional.mse_loss(out, y.half())
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        rates.append(engine.get_lr()[0])
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, float(sum(p.full_tensor().float().sum() for p in engine.module.parameters())))
    if engine.global_rank == 0:
        with open(os.environ["RESULT"], "w") as file:
            json.dump(
                {
                    "losses": losses,
                    "boundaries": boundaries,
                    "rates": rates,
                    "steps": engine.global_steps,
                    "skipped": engine.skipped_steps,
                    "micro_steps": engine.micro_steps,
                    "accumulation": engine.gradient_accumulation_steps(),
                    "scale": engine.cur_scale,
                    "sums": gathered,
                    "dtype": str(out.dtype),
                    "scheduler": scheduler.get_last_lr()[0],
                },
                file,
            )


if __name__ == "__main__":
    main()
