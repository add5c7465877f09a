"""Models whose constructors are functions, built normally and deferred, and what they must have in common."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import dscompile
from dscompile.deferred import deferred_init, is_deferred, materialise

Fill = Callable[[Any], None]


class Built(nn.Module):
    """A module whose constructor is a function."""

    def __init__(self, fill: Fill) -> None:
        super().__init__()
        fill(self)


def build(fill: Fill) -> nn.Module:
    with deferred_init():
        return Built(fill)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, tensor.is_contiguous()


def shared(named: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, dscompile.deferred.DeferredReport]:
    """Build normally and deferred from one seed; check values, layouts, ties and every generator's state."""
    seeds = (lambda: torch.manual_seed(3), lambda: random.seed(3), lambda: np.random.seed(3))
    for seed in seeds:
        seed()
    normal = make()
    after = torch.get_rng_state()
    for seed in seeds:
        seed()
    with deferred_init():
        deferred = make()
    assert torch.equal(torch.get_rng_state(), after), "the generator is not where a normal construction leaves it"
    assert is_deferred(deferred)
    report = materialise(deferred)
    assert torch.equal(torch.get_rng_state(), after), "materialise moved the generator"
    assert not is_deferred(deferred)
    want, have = tensors(normal), tensors(deferred)
    assert list(want) == list(have)
    for name in want:
        assert facts(want[name]) == facts(have[name]), name
        assert torch.equal(want[name], have[name]), name
    assert shared(want) == shared(have)
    assert list(normal.state_dict()) == list(deferred.state_dict())
    return normal, deferred, report


def sharing(module: Any) -> None:
    module.embed = nn.Embedding(8, 4)
    module.head = nn.Linear(4, 8, bias=False)
    module.head.weight = module.embed.weight
    flat = torch.randn(20)
    module.front = nn.Parameter(flat[:8].view(2, 4))
    module.rest = nn.Parameter(flat[8:])
    q, k, v = torch.randn(9, 3).chunk(3)
    module.q, module.k, module.v = nn.Parameter(q.clone()), nn.Parameter(k.contiguous()), nn.Parameter(v.t())
    module.first = nn.Linear(3, 3)
    module.second = copy.deepcopy(module.first)
    nn.init.zeros_(module.first.weight)
    module.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
