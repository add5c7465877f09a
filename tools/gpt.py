"""A plain GPT (pre-norm, learned positions, causal SDPA): the model of ``dscompile train`` and of ``benchmarks/``.

Nothing in it knows about dscompile: it is the unchanged single-device model that the compiler is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. ``width`` must be a multiple of ``heads``."""

    vocab: int
    layers: int
    width: int
    heads: int
    context: int


SIZES: dict[str, GPTConfig] = {
    "gpt-500k": GPTConfig(vocab=512, layers=2, width=128, heads=4, context=64),
    "gpt-1m": GPTConfig(vocab=256, layers=4, width=128, heads=4, context=128),
    "gpt-3m": GPTConfig(vocab=1024, layers=4, width=256, heads=4, context=128),
    "gpt-30m": GPTConfig(vocab=8192, layers=6, width=512, heads=8, context=256),
    "gpt-110m": GPTConfig(vocab=8192, layers=12, width=768, heads=12, context=256),
}


class Block(nn.Module):
    """One transformer block: attention and a 4x GELU MLP, each with a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, seq, width]`` to the same shape."""
        batch, seq, width = x.shape
        shape = (batch, seq, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, seq, width))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class GPT(nn.Module):
    """Token and position embedding, blocks, a final norm and an untied head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits ``[batch, seq, vocab]``, or the mean cross-entropy if ``targets`` (``[batch, seq]``) is given."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
