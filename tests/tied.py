"""One small model that has what a whole step must get right; several tests step it."""

from __future__ import annotations

from torch import Tensor, nn


class Tied(nn.Module):
    """A tied embedding, a frozen layer, an unused one, buffers that forward writes, and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.frozen(self.norm(self.embed(ids))).relu())
