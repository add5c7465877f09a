"""What cannot be deferred, and what is wrong to do with a deferred model: errors and reports that say so."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dscompile.deferred import build_deferred, deferred_init, is_deferred, materialise
from dscompile.errors import DeferredError, UnsupportedError
from dscompile.torch_compat import dispatch_modes
from tests.deferred_models import Built, both, build

# -- what cannot be deferred -----------------------------------------------------------------------------------------


def test_sparse_buffer_is_built_for_real_and_reported() -> None:
    def fill(module: Any) -> None:
        module.w = nn.Parameter(torch.rand(3, 3))
        module.register_buffer("graph", torch.eye(3).to_sparse())
        module.register_buffer("spread", module.graph @ torch.rand(3, 3))

    torch.manual_seed(3)
    normal = Built(fill)
    torch.manual_seed(3)
    model = build(fill)
    report = materialise(model)
    assert report.route == "mixed"
    assert len(report.fallbacks) == 2
    assert "sparse" in report.fallbacks[0]
    assert "test_deferred_errors.py" in report.fallbacks[0]
    assert torch.equal(normal.spread, model.spread)
    assert torch.equal(normal.w, model.w)


class Own(nn.Parameter):
    """A user's class of parameters."""


def own_class(module: Any) -> None:
    module.a = nn.Parameter(torch.rand(3) * random.random() * np.random.rand())
    module.b = Own(torch.rand(3))


def test_parameter_class_is_refused_and_build_deferred_falls_back() -> None:
    with pytest.raises(UnsupportedError, match=r"Own at .*test_deferred_errors\.py"):
        build(own_class)
    made = []
    for make in (lambda: (Built(own_class), None), lambda: build_deferred(lambda: Built(own_class))):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        made.append(make())
    (normal, _), (model, reason) = made
    assert reason is not None
    assert "Own" in reason
    assert not is_deferred(model)
    assert type(model.b) is Own
    assert torch.equal(normal.a, model.a)
    assert torch.equal(normal.b, model.b)
    model, reason = build_deferred(lambda: nn.Linear(2, 2))
    assert reason is None
    assert is_deferred(model)


def test_numpy_view_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        build(lambda module: torch.rand(3).numpy().fill(0))


def test_set_to_a_real_tensor_is_refused() -> None:
    """The two would share memory from then on, and the record could not see what is written to the real one."""
    with pytest.raises(UnsupportedError, match="mixes a deferred tensor"):
        build(lambda module: torch.rand(3).set_(torch.tensor([1.0])))


def test_lazy_modules_stay_lazy() -> None:
    model = build(lambda module: module.add_module("layer", nn.LazyLinear(3)))
    assert not is_deferred(model)
    assert model.layer(torch.ones(1, 2)).shape == (1, 3)  # type: ignore[operator]


def test_custom_operators_are_run_for_real() -> None:
    """The one here draws without saying so, and its fake kernel lies about the strides."""
    with torch.library._scoped_library("deferred_test", "FRAGMENT") as library:
        library.define("noise(Tensor x) -> Tensor")
        library.impl("noise", lambda x: (x + torch.rand(2, 3)).t().contiguous().t(), "CompositeExplicitAutograd")
        torch.library.register_fake("deferred_test::noise", torch.empty_like, lib=library)

        def fill(module: Any) -> None:
            module.register_buffer("x", torch.ops.deferred_test.noise(torch.rand(2, 3)))
            module.register_buffer("after", torch.rand(3))

        _, model, report = both(lambda: Built(fill))
        assert model.x.stride() == (1, 2)  # type: ignore[union-attr, operator]
        assert len(report.value_reads) == 1


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_wrong_fake_layout_is_an_error() -> None:
    """PyTorch's fake kernel of this operator promises float32: better no values than wrong ones."""
    model = build(lambda m: m.register_buffer("x", torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)))
    with pytest.raises(UnsupportedError, match=r"quantize_per_tensor.*qint8.*promised.*float32"):
        materialise(model)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def linear() -> nn.Linear:
    with deferred_init():
        return nn.Linear(3, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(torch.rand(2, 3)),
        lambda m: m.weight.sum(),
        lambda m: m.weight[0, 0].item(),
        lambda m: m.weight.tolist(),
        lambda m: m.weight.detach().numpy(),
        lambda m: m.weight.data.zero_(),
        lambda m: pickle.dumps(m),
    ],
)
def test_use_before_materialise(linear: nn.Linear, use: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(
        DeferredError, match=r"Linear\.(weight|bias) .*test_deferred_errors\.py:\d+.*dscompile\.materialise"
    ):
        use(linear)


def test_loading_names_the_remedy(linear: nn.Linear) -> None:
    with pytest.raises(RuntimeError, match=r"dscompile\.materialise"):
        linear.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    linear.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, assign=True)
    assert not is_deferred(linear)


def test_tensor_held_outside_after_place(linear: nn.Linear) -> None:
    held = linear.weight
    materialise(linear, lambda fqn, full, is_parameter: nn.Parameter(full.detach().clone()))
    with pytest.raises(DeferredError, match="outside the model's modules"):
        held.sum()


def test_printing(linear: nn.Linear) -> None:
    assert "in_features=3" in repr(linear)
    assert (
        repr(linear.weight) == "Parameter(deferred, size=(3, 3), dtype=torch.float32, device=cpu, requires_grad=True)"
    )


def test_conversion_and_copies_after_the_block(linear: nn.Linear) -> None:
    torch.manual_seed(3)
    normal = nn.Linear(3, 3)
    torch.manual_seed(3)
    with deferred_init():
        model = nn.Linear(3, 3)
    copied = copy.deepcopy(model)
    materialise(copied)
    assert is_deferred(model)
    assert torch.equal(copied.weight, normal.weight)
    model.half()
    materialise(model)
    assert torch.equal(model.weight, normal.weight.half())


def test_optimizer_made_inside_the_block() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    materialise(model)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before - 1)


def test_blocks_nest_and_end() -> None:
    with deferred_init():
        with deferred_init():
            inner = nn.Linear(2, 2)
        outer = nn.Linear(2, 2)
    both_of_them = nn.Sequential(inner, outer)
    assert is_deferred(outer.weight)
    assert materialise(both_of_them).materialised == 4
    assert materialise(both_of_them).route == "real"
    with pytest.raises(KeyError), deferred_init():
        raise KeyError("x")
    assert not dispatch_modes()
    assert type(torch.zeros(3)) is torch.Tensor
    assert not is_deferred(nn.Linear(2, 2))


def test_two_blocks_do_not_mix(linear: nn.Linear) -> None:
    with pytest.raises(UnsupportedError, match="another deferred_init block"), deferred_init():
        linear.weight.data.mul_(2)


def test_gradient_hooks_are_refused() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
        model.weight.register_hook(lambda grad: grad)
    with pytest.raises(UnsupportedError, match="gradient hooks"):
        materialise(model)


def test_the_users_own_error_is_the_real_one() -> None:
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        build(lambda module: torch.rand(3) @ torch.rand(4))
