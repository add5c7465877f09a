"""Deferred construction: the same bits as a normal one."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from dscompile.deferred import materialise
from tests.deferred_models import Built, Fill, both, build, sharing

sys.path.insert(0, str(Path(__file__).parent / "models"))
from more import MORE
from zoo import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
def test_transformers(name: str) -> None:
    _, model, report = both(lambda: ZOO[name]()[0])
    assert report.route == "deferred"
    assert not report.fallbacks
    loss = model(**ZOO[name]()[1]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.dim() > 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MORE))
def test_more_transformers(name: str) -> None:
    _, _, report = both(lambda: MORE[name]()[0])
    assert report.route == "deferred"


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(4, 5, 2, bidirectional=True),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "embedding": lambda: nn.Embedding(10, 4, padding_idx=2),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(3, 4, 3), nn.PReLU()),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "weight_norm_old": lambda: weight_norm(nn.Linear(4, 5)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 5)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers(name: str) -> None:
    _, _, report = both(LAYERS[name])
    assert report.route == "deferred"
    assert all("geqrf" in read for read in report.value_reads)  # orthogonal's: it has no fake kernel


def test_recurrent_layer_runs() -> None:
    """Its flat weight list, with weak references, holds the filled parameters."""
    normal, model, _ = both(LAYERS["lstm"])
    x = torch.rand(3, 2, 4)
    assert torch.equal(normal(x)[0], model(x)[0])
    assert model._flat_weights[0] is model.weight_ih_l0  # type: ignore[union-attr, index]


def rejection(module: Any) -> None:
    for name, options in {"a": {"std": 0.02}, "b": {"std": 2.0}, "c": {"a": 0.9, "b": 1.1}}.items():
        weight = nn.Parameter(torch.empty(30, 40))
        nn.init.trunc_normal_(weight, **options)
        module.register_parameter(name, weight)


def seeding(module: Any) -> None:
    module.a = nn.Linear(4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module.b = nn.Linear(4, 4)
    module.c = nn.Linear(4, 4)
    state = torch.get_rng_state()
    module.d = nn.Linear(4, 4)
    torch.set_rng_state(state)
    module.e = nn.Linear(4, 4)
    generator = torch.Generator().manual_seed(5)
    module.f = nn.Parameter(torch.randn(30, 3, generator=generator))
    module.g = nn.Parameter(torch.empty(30, 3).normal_(generator=generator))
    module.h = nn.Parameter(torch.rand(3) * random.random() + np.random.rand())


def outside_values(module: Any) -> None:
    angles = np.sin(np.arange(24).reshape(6, 4) / 3)
    module.w = nn.Parameter(torch.empty(6, 4))
    with torch.no_grad():
        module.w[:, 0::2] = torch.FloatTensor(angles[:, 0::2])
        module.w[:, 1::2] = torch.from_numpy(angles[:, 1::2]).float()
    module.k = nn.Parameter(torch.randn(5, 5))
    module.q = nn.Parameter(torch.from_numpy(np.linalg.qr(module.k.detach().numpy())[0].copy()))
    real = torch.tensor([1.0, 2.0, 3.0])
    drawn = torch.rand(3)
    real.copy_(drawn)
    real.add_(drawn)
    module.register_buffer("real", real)
    module.register_buffer("before", drawn + real)
    real.mul_(2)


def steering(module: Any) -> None:
    rates = [x.item() for x in torch.linspace(0, 0.1, 5)] + torch.linspace(0, 0.1, 5).tolist()
    module.p = nn.Parameter(torch.full((3,), rates[2] + rates[8]))
    x = torch.rand(4)
    module.register_buffer("yes" if x.sum() > 2 else "no", x)
    noise = torch.randn(10)
    module.register_buffer("places", (noise > 0).nonzero())
    module.w = nn.Parameter(noise[noise > 0])
    noise[noise < 0] = 0
    module.register_buffer("noise", noise)
    module.register_buffer("unique", torch.unique(torch.randint(5, (20,))))
    module.register_buffer("poisson", torch.poisson(torch.rand(6) * 5))
    module.register_buffer("chosen", torch.multinomial(torch.rand(6), 3))
    module.register_buffer("order", torch.randperm(9))
    module.register_buffer("gamma", torch.distributions.Gamma(torch.ones(3), torch.ones(3)).sample())
    module.register_buffer("last", torch.rand(3) if torch.equal(x, x.clone()) else torch.zeros(3))


def rotary(module: Any) -> None:
    inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    angles = torch.outer(torch.arange(16), inverse)
    module.register_buffer("turn", torch.polar(torch.ones_like(angles), angles), persistent=False)
    module.register_buffer("back", module.turn.conj())
    module.register_buffer("imaginary", module.turn.conj().imag)
    module.register_buffer("cosine", module.turn.real)
    module.register_buffer("pairs", torch.view_as_real(module.turn))
    module.register_buffer("positions", torch.arange(12).expand((1, -1)))
    module.register_buffer("causal", torch.tril(torch.ones(5, 5, dtype=torch.bool)).view(1, 1, 5, 5))
    module.register_buffer("none", None)
    copied = copy.deepcopy(nn.ParameterDict({"turn": nn.Parameter(module.turn), "back": nn.Parameter(module.back)}))
    module.copied = copied


def precisions(module: Any) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module.low = nn.Linear(5, 7)
        module.register_buffer("steps", torch.arange(4) * 0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    module.half = nn.Linear(3, 3).half()
    module.double = nn.Linear(3, 3).double()
    module.lstm = nn.LSTM(3, 4).bfloat16()


def rebinding(module: Any) -> None:
    module.a = nn.Parameter(torch.randn(3, 3))
    module.a.data = torch.tensor([1.0, 2.0])
    module.a.data.mul_(2)
    module.b = nn.Parameter(torch.randn(3, 3))
    module.b.data = torch.randn(2, 2)
    module.b.data[:, 0] = module.b.data[:, 1]
    module.c = nn.Parameter(torch.Tensor(4, 4))
    module.c.data.normal_(0, 1).clamp_(-0.5, 0.5)
    module.d = nn.Parameter(torch.FloatTensor(3).uniform_())
    module.e = nn.Buffer(torch.rand(3), persistent=False)
    grown = torch.rand(3)
    grown.resize_(6)
    grown[3:] = 1
    grown[:3].normal_()  # all of the old storage, half of the new
    module.register_buffer("grown", grown)
    pointed = torch.rand(4)
    pointed.set_(torch.rand(2))
    module.register_buffer("pointed", pointed)


def initialisers(module: Any) -> None:
    functions: list[Callable[[torch.Tensor], Any]] = [
        nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        nn.init.orthogonal_,
        nn.init.eye_,
        lambda t: nn.init.sparse_(t, 0.3),
        lambda t: torch.linalg.svd(t, full_matrices=False)[0],
        lambda t: nn.functional.dropout(t.fill_(1.0), 0.5, training=True),
    ]
    for index, function in enumerate(functions):
        weight = nn.Parameter(torch.empty(5, 6).zero_())
        with torch.no_grad():
            result = function(weight)
        module.register_parameter(f"w{index}", weight)
        module.register_buffer(f"r{index}", result.detach().clone())


CASES = [rejection, seeding, outside_values, steering, rotary, precisions, sharing, rebinding, initialisers]


@pytest.mark.parametrize("fill", CASES, ids=lambda f: f.__name__)
def test_constructors(fill: Fill) -> None:
    _, _, report = both(lambda: Built(fill))
    assert report.route == "deferred"


def test_attributes_survive() -> None:
    """Tensors in plain attributes and containers, and the user's own attributes on tensors."""

    def fill(module: Any) -> None:
        module.w = nn.Parameter(torch.rand(2))
        module.w.label = "mine"
        module.alias = module.w.detach()
        module.plain = [torch.rand(2), (torch.rand(3), {"a": torch.rand(1)})]

    normal, model, _ = both(lambda: Built(fill))
    assert model.w.label == "mine"  # type: ignore[union-attr]
    assert model.alias.data_ptr() == model.w.data_ptr()  # type: ignore[union-attr, operator]
    for want, have in zip(leaves(normal.plain), leaves(model.plain), strict=True):
        assert type(have) is torch.Tensor
        assert torch.equal(want, have)


def leaves(value: Any) -> Iterator[torch.Tensor]:
    yield from torch.utils._pytree.tree_leaves(value)


def test_value_reads_are_counted() -> None:
    report = materialise(build(rejection))
    assert sum(report.value_reads.values()) >= 3
    assert all("/torch/" not in place.split(" at ")[1] for place in report.value_reads)  # the user's line, not torch's
    # A rejection loop goes on from its last round: less than two runs of each operation, and the last one's replay.
    assert report.replayed < 3 * report.recorded
