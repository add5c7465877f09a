"""No rank of a large world is left without its part of a large weight, in one cut or, on a grid of ranks, in two."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn

import dscompile
from dscompile.placement import spec_of
from dscompile.tools.gpt import GPT, SIZES
from tests.distributed.planned import fake_world


class Llama7B(nn.Module):
    """The weights of Llama 2 7B: names and shapes only (Touvron et al., 2023: width 4096, 11008 hidden, 32 layers)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(32000, 4096)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            for name in ("q", "k", "v", "o"):
                setattr(layer, name, nn.Linear(4096, 4096, bias=False))
            layer.gate = nn.Linear(4096, 11008, bias=False)
            layer.up = nn.Linear(4096, 11008, bias=False)
            layer.down = nn.Linear(11008, 4096, bias=False)
            layer.norm = nn.RMSNorm(4096)
            self.layers.append(layer)
        self.head = nn.Linear(4096, 32000, bias=False)


def gpt() -> nn.Module:
    return GPT(SIZES["gpt-30m"])


GRIDS = {("gpt", 1024): (32, 32)}
"""``[1536, 512]`` in one cut: 1536 / 1024 rows are two, for 768 ranks."""


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [64, 1024])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_no_rank_is_empty(name: str, world: int, stage: int) -> None:
    with torch.device("meta"):
        model = gpt() if name == "gpt" else Llama7B()
    with fake_world(world, rank=world - 1):
        dscompile.distribute(model, config={"zero": {"stage": stage}}, sync_init=False)
        empty = set()
        for fqn, param in model.named_parameters():
            spec = spec_of(param)
            assert spec is not None
            if prod(spec.shape) >= world * 16:
                parts = [prod(spec.local_shape(rank)) for rank in range(world)]
                assert sum(parts) == prod(spec.shape)
                assert param.to_local().numel() == parts[-1]  # DTensor's own rule agrees, for the last rank
                if 0 in parts:
                    empty.add(fqn)
        meshes = {tuple(param.device_mesh.shape) for param in model.parameters()}
    assert not empty
    assert meshes == {GRIDS.get((name, world), (world,))}
