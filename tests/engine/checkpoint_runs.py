"""A small training run that can be saved and gone on with at another number of ranks and stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dscompile
from dscompile.engine.checkpoint import Loaded, SaveHandle, load_checkpoint, save_checkpoint

ROWS, TIME, VOCABULARY = 12, 6, 29


class Net(nn.Module):
    """Tied, frozen, unused, scalar and uneven parameters; a buffer that training changes, and one that is not saved."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up = nn.Linear(width, 3 * width + 1)
        self.down = nn.Linear(3 * width + 1, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(width), persistent=False)
        self.seen: Tensor
        self.mask: Tensor

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.seen += 1
        x = self.embedding(ids)
        x = x + self.frozen(self.down(nn.functional.gelu(self.up(x)))) * self.mask.to(x.dtype)
        return nn.functional.cross_entropy((self.head(x) * self.scale).flatten(0, 1), targets.flatten())


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    if kind == "AdamW":
        return torch.optim.AdamW(groups, lr=1e-2)
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=5e-2, momentum=0.9)
    return getattr(torch.optim, kind)(groups, lr=1e-2)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return tuple(torch.randint(VOCABULARY, (2, ROWS, TIME), generator=generator))  # type: ignore[return-value]


class Run:
    """Model, optimizer, schedule and position on this rank. Stage None: a plain model that no one distributes."""

    def __init__(
        self, stage: int | None, kind: str = "AdamW", *, seed: int = 0, compiled: bool = False, dtype: str = "fp32"
    ) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = Net()
        if stage is not None:
            dscompile.distribute(self.model, config={"zero": {"stage": stage}, "precision": {"param_dtype": dtype}})
        self.call: Any = torch.compile(self.model, backend="dscompile") if compiled else self.model
        self.optimizer = make_optimizer(kind, self.model)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 8], 0.5)
        self.step = 0
        self.alone = stage is None
        self.rank, self.world = (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())

    def train(self, steps: int) -> list[float]:
        """Losses of the whole batch."""
        losses = []
        for _ in range(steps):
            rows = slice(self.rank * ROWS // self.world, (self.rank + 1) * ROWS // self.world)
            ids, targets = batch(self.step)
            loss = self.call(ids[rows], targets[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            total = loss.detach().float().clone()
            if not self.alone:
                dist.all_reduce(total)
            losses.append(float(total) / self.world)
        return losses

    def save(self, directory: str | Path, tag: str | None = None, **options: Any) -> SaveHandle:
        state = {"schedule": self.schedule.state_dict(), "step": self.step}
        tag = tag or f"step_{self.step}"
        return save_checkpoint(directory, tag, model=self.model, optimizer=self.optimizer, state=state, **options)

    def load(self, directory: str | Path, tag: str | None = None, **options: Any) -> Loaded:
        loaded = load_checkpoint(directory, tag, model=self.model, optimizer=self.optimizer, **options)
        self.schedule.load_state_dict(loaded.state["schedule"])
        self.step = loaded.state["step"]
        return loaded

    def values(self) -> dict[str, Tensor]:
        """Every tensor of model and optimizer, whole, copied."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        found = {n: v for n, v in self.model.state_dict().items()}
        for param, state in self.optimizer.state.items():
            found |= {f"{names[id(param)]} {k}": v for k, v in state.items()}
        return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in found.items()}
