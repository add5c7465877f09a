"""The matrix of the parameter contract in eager mode: each row on 2 and on 3 ranks, against one process.

On 4 ranks, which form a grid, the rows run in tests/distributed/test_grid.py.
"""

from __future__ import annotations

import contextlib
import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import dscompile
from dscompile.placement import spec_of
from tests.distributed.contract import (
    assert_gradients,
    assert_values,
    data,
    full,
    mean_loss,
    param,
    parity,
    run_checks,
    seeded,
)
from tests.ranks import run_ranks


class Odd(nn.Module):
    """Sizes that do not divide, one smaller than the world, a scalar, a tied pair, an unused one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Parameter(torch.randn(1))
        self.unused = nn.Parameter(torch.randn(4))
        self.wide = nn.Parameter(torch.randn(9, 9))  # one cut gives 4 ranks 3 + 3 + 3 + 0: they form a grid
        self.register_buffer("shift", torch.randn(5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(tokens) + self.shift)) * self.scale * self.wide.cos().mean()
        return F.cross_entropy((self.head(x) * self.one).flatten(0, 1), tokens.flatten().roll(1))


def odd_loss(model: nn.Module, rank: int) -> Tensor:
    loss: Tensor = model(data((2, 4), rank, high=7))
    return loss


def square(shape: tuple[int, ...]) -> Any:
    def loss(model: nn.Module, rank: int) -> Tensor:
        out = model(data(shape, rank))
        out = out[0] if isinstance(out, tuple) else out
        total: Tensor = out.square().mean()
        return total

    return loss


# -- the rows ----------------------------------------------------------------------------------------------------------


def check_odd_sizes_at_every_stage(rank: int, world: int) -> None:
    for stage in (0, 1, 2, 3):
        model, _ = parity(Odd, odd_loss, rank, world, stage=stage)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert spec_of(param(model, "scale")).dim == -1
        # [7, 5]: on 3 ranks columns pad less (2 + 2 + 1), but a resident copy (stages 1, 2) is cut in whole rows
        assert spec_of(param(model, "embed.weight")).dim == (-1 if stage == 0 else int(world == 3 and stage == 3))


def check_every_stage_gives_the_same_bits(rank: int, world: int) -> None:
    grads = []
    for stage in (0, 1, 3):
        model = dscompile.distribute(seeded(Odd), config={"zero": {"stage": stage}})
        odd_loss(model, rank).backward()
        grads.append({n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert all(torch.equal(grads[0][name], other[name]) for name in grads[0])


def check_second_backward_accumulates(rank: int, world: int) -> None:
    model, reference = parity(Odd, odd_loss, rank, world)
    odd_loss(model, rank).backward()
    mean_loss(reference, odd_loss, world).backward()
    assert_gradients(model, reference)


def check_frozen_before_and_after(rank: int, world: int) -> None:
    def make() -> nn.Module:
        model = Odd()
        model.inner.requires_grad_(False)
        return model

    model, reference = parity(make, odd_loss, rank, world)
    for m in (model, reference):
        m.zero_grad()
        m.inner.requires_grad_(True)
        m.embed.requires_grad_(False)
    odd_loss(model, rank).backward()
    mean_loss(reference, odd_loss, world).backward()
    assert_gradients(model, reference)


def check_adapter_added_later(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Odd, rank))
    reference = seeded(Odd)
    for m in (model, reference):
        m.inner.register_parameter("lora", nn.Parameter(torch.ones(5, 5)))
        m.inner.register_forward_hook(lambda mod, args, out: out + args[0] @ mod.lora)
    with pytest.raises(dscompile.DscompileError, match=r"inner\.lora.*distribute\(model\) again"):
        dscompile.check_plain(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    odd_loss(model, rank).backward()
    with pytest.raises(dscompile.DscompileError, match="added after distribute"):
        optimizer.step()
    model.zero_grad()
    dscompile.distribute(model)
    dscompile.check_plain(model)
    odd_loss(model, rank).backward()
    mean_loss(reference, odd_loss, world).backward()
    assert_gradients(model, reference)


def check_assigned_parameter(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Odd))
    model.inner.weight = nn.Parameter(torch.ones(5, 5))
    with pytest.raises(dscompile.DscompileError, match=r"inner\.weight"):
        dscompile.check_plain(model)
    model.inner.bias = None
    dscompile.distribute(model)
    assert spec_of(param(model, "inner.weight")) is not None
    assert torch.equal(model.inner.weight, torch.ones(5, 5))
    assert model.inner.bias is None


def check_buffers_follow_the_first_rank(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Odd, rank))
    assert torch.equal(model.shift, seeded(Odd).shift)
    apart = dscompile.distribute(seeded(Odd, rank), sync_init=False)
    assert torch.equal(apart.shift, seeded(Odd, rank).shift)


def check_batch_norm(rank: int, world: int) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()

    parity(make, square((6, 3)), rank, world)


def check_lstm(rank: int, world: int) -> None:
    model, _ = parity(lambda: nn.LSTM(3, 4, num_layers=2), square((5, 2, 3)), rank, world)
    assert dscompile.access_count(model) == 16  # 8 weights, which PyTorch asks for twice: to check dtypes, and to use
    assert "_flat_weights" not in vars(model)


def check_attention(rank: int, world: int) -> None:
    parity(lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), square((2, 3, 6)), rank, world)
    model = dscompile.distribute(seeded(lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))).eval()
    reference = seeded(lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)).eval()
    x = data((2, 3, 6), 0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))


def check_convolution_is_cut_where_no_rank_is_empty(rank: int, world: int) -> None:
    model, _ = parity(lambda: nn.Conv2d(6, 1, 3), square((2, 6, 4, 4)), rank, world)
    assert spec_of(param(model, "weight")).dim == 1  # [1, 6, 3, 3]


def check_weight_norm_before(rank: int, world: int) -> None:
    parity(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), square((2, 3)), rank, world)


def check_parametrize_after_is_refused(rank: int, world: int) -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.orthogonal):
        model = dscompile.distribute(seeded(lambda: nn.Linear(3, 4)))
        with pytest.raises(dscompile.DscompileError, match=r"before distribute"):
            wrap(model)
    model = dscompile.distribute(seeded(lambda: nn.Linear(3, 4)))
    with pytest.raises(dscompile.DscompileError, match="before distribute"):
        del model.weight
    assert torch.equal(model.weight, seeded(lambda: nn.Linear(3, 4)).weight)


def check_parameter_list_and_dict(rank: int, world: int) -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ParameterList([torch.randn(3), torch.randn(3)])
            self.dict = nn.ParameterDict({"a": torch.randn(3)})

        def forward(self, x: Tensor) -> Tensor:
            return x * self.list[0] + self.list[1] * self.dict["a"]

    parity(Lists, square((2, 3)), rank, world)


def check_checkpoint(rank: int, world: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.linear, x, use_reentrant=False).tanh()
            return x

    parity(Twice, square((2, 3)), rank, world)


def check_inference(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Odd)), seeded(Odd)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(odd_loss(model, 0), odd_loss(reference, 0))


def check_hooks_fire_on_the_dtensor(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Odd))
    seen: list[str] = []
    for name, tensor in model.named_parameters():
        tensor.register_post_accumulate_grad_hook(lambda p, n=name: seen.append(n) if p.grad is not None else None)
    odd_loss(model, rank).backward()
    assert sorted(seen) == sorted(n for n, _ in model.named_parameters() if n != "unused")


def check_functional_call(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Odd)), seeded(Odd)
    values = {name: torch.ones_like(p) for name, p in reference.named_parameters()}
    x = data((2, 4), 0, high=7)
    want = torch.func.functional_call(reference, values, (x,))
    assert torch.equal(torch.func.functional_call(model, values, (x,)), want)
    assert torch.equal(odd_loss(model, 0), odd_loss(reference, 0))


def check_double_backward(rank: int, world: int) -> None:
    def penalty(model: nn.Module, ranks: range) -> Tensor:
        loss = sum(square((2, 3))(model, r) for r in ranks) / len(ranks)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return sum(full(g).square().sum() for g in grads)

    model, reference = dscompile.distribute(seeded(lambda: nn.Linear(3, 4))), seeded(lambda: nn.Linear(3, 4))
    penalty(reference, range(world)).backward()
    penalty(model, range(rank, rank + 1)).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(full(ours.grad), theirs.grad)


def check_deepcopy_and_print(rank: int, world: int) -> None:
    for stage in (1, 3):
        model, reference = parity(Odd, odd_loss, rank, world, stage=stage)
        other = copy.deepcopy(model)
        assert list(other.state_dict()) == list(model.state_dict())
        other.zero_grad()
        with torch.no_grad():
            for tensor in other.parameters():
                tensor.zero_()
        assert_values(model, reference)  # the original is untouched
        assert not other.inner.weight.any()
        assert other.embed.weight.equal(other.head.weight)
        odd_loss(other, rank).backward()
        assert param(other, "inner.weight").grad is not param(model, "inner.weight").grad
        assert re.findall(r"-?\d\.\d+", str(model.inner.weight)) == re.findall(
            r"-?\d\.\d+", str(reference.inner.weight)
        )
        assert repr(model) == repr(reference)
        assert isinstance(model.inner, nn.Linear)


def check_state_dict_both_ways(rank: int, world: int) -> None:
    model, other = dscompile.distribute(seeded(Odd)), dscompile.distribute(seeded(Odd, 5))
    other.load_state_dict(model.state_dict())
    assert_values(other, seeded(Odd))
    plain = seeded(Odd, 7)
    given = plain.state_dict()
    other.load_state_dict(given)
    assert not isinstance(given["inner.weight"], DTensor)  # the caller's mapping is left alone
    assert_values(other, plain)
    assert torch.equal(odd_loss(other, 0), odd_loss(plain, 0))
    linear, plain = dscompile.distribute(seeded(lambda: nn.Linear(3, 4))), nn.Linear(3, 4)
    linear.load_state_dict(plain.state_dict(), assign=True)
    assert_values(linear, plain)
    assert torch.equal(linear.weight, plain.weight)
    dscompile.check_plain(linear)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**plain.state_dict(), "inner.bias": torch.zeros(6)})


def check_dtype_change(rank: int, world: int) -> None:
    for stage in (1, 3):
        model = dscompile.distribute(seeded(Odd), config={"zero": {"stage": stage}}).to(torch.float64)
        reference = seeded(Odd).to(torch.float64)
        odd_loss(model, rank).backward()
        mean_loss(reference, odd_loss, world).backward()
        assert_gradients(model, reference, atol=1e-12)


def check_two_models(rank: int, world: int) -> None:
    first, reference = parity(Odd, odd_loss, rank, world)
    second = dscompile.distribute(seeded(lambda: nn.Linear(3, 4)), config={"zero": {"stage": 1}})
    square((2, 3))(second, rank).backward()
    assert_gradients(first, reference)
    assert type(first.inner) is not type(second)


def check_in_place_writes(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(lambda: nn.Linear(3, 4)))
    before = model.weight.clone()
    w = model.weight
    writes = [
        lambda: nn.init.zeros_(model.weight),
        lambda: model.weight.data.add_(1),
        lambda: w.detach().fill_(0),
        lambda: w.view(-1).mul_(2),
        lambda: w.T.zero_(),
        lambda: w.__setitem__(0, 1.0),
        lambda: torch.add(before, 1, out=w),
        lambda: setattr(w, "data", before),
        lambda: w.data.copy_(before),
        lambda: F.relu(w.detach(), inplace=True),
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises(dscompile.DscompileError, match=r"would be lost.*gathered\(module, write"):
            write()
    with pytest.raises(ValueError, match="read-only"):
        w.detach().numpy()[0] = 1
    assert type(w + 1) is Tensor
    assert type(F.linear(before, w)) is Tensor
    assert torch.equal(model.weight, before)


def check_gathered_write(rank: int, world: int) -> None:
    for stage in (0, 1, 3):
        model = dscompile.distribute(seeded(Odd), config={"zero": {"stage": stage}})
        with dscompile.gathered(model.inner, write=True):
            nn.init.constant_(model.inner.weight, 3.0)
            model.inner.bias.data[0] = 9.0
        assert bool((full(param(model, "inner.weight")) == 3).all())
        assert full(param(model, "inner.bias"))[0] == 9
        assert bool((model.inner.weight == 3).all())
        with dscompile.gathered(model, write=True, source=1):
            model.one.fill_(float(rank))
        assert float(full(param(model, "one")).detach()) == 1.0
        with contextlib.suppress(ZeroDivisionError), dscompile.gathered(model.inner, write=True):
            model.inner.weight.zero_()
            _ = 1 / 0
        assert bool((full(param(model, "inner.weight")) == 3).all())


def check_reads_are_counted(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Odd))
    with torch.no_grad():
        odd_loss(model, 0)
        assert dscompile.access_count(model) == 7  # embed, inner x 2, scale, wide, head, one
        with dscompile.gathered(model):
            odd_loss(model, 0)
            odd_loss(model, 0)
    assert dscompile.access_count(model) == 7


def check_deferred_construction(rank: int, world: int) -> None:
    for stage in (1, 3):
        config = {"zero": {"stage": stage}}
        torch.manual_seed(0)
        with dscompile.deferred_init():
            inside = Odd()
        torch.manual_seed(0)
        lstm = dscompile.distribute(model_fn=lambda: nn.LSTM(3, 4), config=config)
        assert_values(lstm, seeded(lambda: nn.LSTM(3, 4)))
        square((5, 2, 3))(lstm, rank).backward()
        model, reference = dscompile.distribute(inside, config=config), seeded(Odd)
        assert model is inside
        assert_values(model, reference)
        assert torch.equal(model.shift, reference.shift)
        odd_loss(model, rank).backward()
        mean_loss(reference, odd_loss, world).backward()
        assert_gradients(model, reference)


def check_memory_is_returned(rank: int, world: int) -> None:
    import gc
    import weakref

    model = dscompile.distribute(seeded(Odd))
    with dscompile.no_sync(model):
        odd_loss(model, rank).backward()
    odd_loss(model, rank).backward()
    shards = [weakref.ref(p.to_local().untyped_storage()) for p in model.parameters()]
    params = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not [r for r in params if r() is not None]
    assert not [r for r in shards if r() is not None]


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=240)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("row", ROWS)
def test_matrix(row: str, world: int) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(world)) if found[row]]
    assert not failed, "\n".join(failed)
