"""The contestants: one training step of one model, as a user of each would write it.

All start from the same weights and see the same batches, so that their losses can be compared step by step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from dscompile.tools.gpt import GPT, SIZES, GPTConfig

NAMES = ("eager", "inductor", "dscompile")


@dataclass(frozen=True)
class Spec:
    """What to build. It travels to fresh processes as JSON.

    Attributes:
        gemm: ``user`` leaves fp32 matrix products as each side has them out of the box; ``same`` gives the peers
            oneDNN's by ``set_float32_matmul_precision("medium")``, as any user can.
        options: dscompile's options, passed through ``torch.compile(options=...)``.
    """

    variant: str = "eager"
    model: str = "gpt-30m"
    layers: int | None = None
    batch: int = 4
    dtype: str = "fp32"
    gemm: str = "user"
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(text))

    @property
    def config(self) -> GPTConfig:
        """The sizes of the model."""
        size = SIZES[self.model]
        return replace(size, layers=self.layers) if self.layers else size

    @property
    def precision(self) -> str:
        """The process-wide fp32 matmul precision that this variant runs under."""
        return "medium" if self.gemm == "same" and self.variant != "dscompile" else "highest"


def compile_with(variant: str, module: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    """``module`` under one of :data:`NAMES`."""
    if variant == "eager":
        return module
    if variant == "inductor":
        return torch.compile(module)
    return torch.compile(module, backend="dscompile", options=options or None)


def token_ids(spec: Spec, step: int) -> Tensor:
    """Token ids ``[batch, context + 1]`` of a step: random, and the same for every variant."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(spec.config.vocab, (spec.batch, spec.config.context + 1), generator=generator)


class Trainer:
    """A model, a fused AdamW, and one training step in two halves, so that each can be timed."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        torch.manual_seed(0)
        self.model = GPT(spec.config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.forward = compile_with(spec.variant, self.model, spec.options)

    def batch(self, step: int) -> Tensor:
        """Token ids of a step, as :func:`token_ids`."""
        return token_ids(self.spec, step)

    def forward_backward(self, ids: Tensor) -> Tensor:
        """Leave gradients in ``.grad``; return the loss."""
        torch.set_float32_matmul_precision(self.spec.precision)
        half = torch.autocast("cpu", torch.bfloat16) if self.spec.dtype == "bf16" else contextlib.nullcontext()
        with half:
            loss: Tensor = self.forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Take the optimizer step and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Bytes of parameters, buffers and optimizer state: what any training process holds between steps."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *state])


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
