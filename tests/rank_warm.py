"""What the server of :mod:`tests.ranks` does once so that no rank has to.

Imports, and what PyTorch prepares at a first compilation: tables, digests of its own source, the processor's vector
instructions. It starts nothing that a fork would lose or share (threads of OpenMP or autograd, a pool of compilers, a
process group), and leaves the cache directory and the code of classes that tests compile alone.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._inductor.codecache import CacheBase, torch_key

import dscompile.backend
import dscompile.distribution
import dscompile.engine.engine
from dscompile.inductor_compat import probe_vector_isa


class Warm(nn.Module):
    """A module that no test compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


torch.set_num_threads(1)
probe_vector_isa().join()
torch_key()
CacheBase.get_system()
options = {"regions": "aten", "cache": False, "summary": False}
torch.compile(Warm(), backend=dscompile.backend.dscompile, options=options)(torch.ones(2, 4))
torch._dynamo.utils.counters.clear()  # tests count from 0
