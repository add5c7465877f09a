"""Optimizers by name: their class, defaults and refusals. Expected steps are PyTorch's or by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscompile.engine.optimizers import ELEMENTWISE, REFUSED, WHOLE_ONLY, create_optimizer, resolve_optimizer
from dscompile.errors import ConfigError, UnsupportedError


def parameters(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(count)]


def stepped(opt: torch.optim.Optimizer, param: nn.Parameter, steps: int = 3) -> torch.Tensor:
    for step in range(steps):
        param.grad = torch.tensor([0.5, -1.0, 0.25]) * (step + 1)
        opt.step()
    return param.detach()


def one(kind: str, **arguments: Any) -> torch.Tensor:
    (param,) = parameters()
    return stepped(create_optimizer(kind, [param], arguments), param)


def theirs(cls: type[torch.optim.Optimizer], **arguments: Any) -> torch.Tensor:
    (param,) = parameters()
    return stepped(cls([param], **arguments), param)


def test_adam_means_adamw() -> None:
    found = one("Adam", lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(found, theirs(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    assert not torch.allclose(found, theirs(torch.optim.Adam, lr=0.1, weight_decay=0.5), atol=1e-2)
    assert isinstance(create_optimizer("adam", parameters(), {}), torch.optim.AdamW)


def test_adam_with_l2_decay() -> None:
    found = one("Adam", lr=0.1, weight_decay=0.5, adam_w_mode=False)
    torch.testing.assert_close(found, theirs(torch.optim.Adam, lr=0.1, weight_decay=0.5))
    assert type(create_optimizer("Adam", parameters(), {"adam_w_mode": False})) is torch.optim.Adam


def test_decay_is_off_by_default_as_in_deepspeed() -> None:
    torch.testing.assert_close(one("AdamW", lr=0.1), theirs(torch.optim.AdamW, lr=0.1, weight_decay=0.0))
    assert create_optimizer("AdamW", parameters(), {}).param_groups[0]["weight_decay"] == 0.0


def test_torch_adam_has_torchs_defaults() -> None:
    torch.testing.assert_close(one("AdamW", lr=0.1, torch_adam=True), theirs(torch.optim.AdamW, lr=0.1))
    assert create_optimizer("Adam", parameters(), {"torch_adam": True}).param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("cls", ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_every_elementwise_optimizer_by_name_in_any_case(cls: type[torch.optim.Optimizer]) -> None:
    name = cls.__name__
    expected = torch.optim.AdamW if name == "Adam" else cls
    for spelt in (name, name.lower(), name.upper()):
        assert type(create_optimizer(spelt, parameters(), {"lr": 0.1})) is expected


def test_the_list_is_torchs() -> None:
    known = {cls.__name__ for cls in ELEMENTWISE}
    known |= {"Lion", "Lamb", "LBFGS", "Muon", "Adafactor", "SparseAdam", "Rprop"}
    assert {name for name in torch.optim.__all__ if name[0].isupper()} - {"Optimizer"} <= known


def test_the_documentation_names_every_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    named = {name: row[2] for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert set(named) == {cls.__name__ for cls in (*ELEMENTWISE, *WHOLE_ONLY)} | set(REFUSED)
    assert {name for name, what in named.items() if "refused by name" in what} == set(REFUSED)
    assert {name for name, what in named.items() if "not sharded" in what} == {cls.__name__ for cls in WHOLE_ONLY}


def test_muon_and_lbfgs_work_on_whole_parameters() -> None:
    matrix = nn.Parameter(torch.eye(3))
    assert type(create_optimizer("muon", [matrix], {"lr": 0.1})) is torch.optim.Muon
    assert type(create_optimizer("LBFGS", parameters(), {"max_iter": 3})) is torch.optim.LBFGS


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_the_fused_kernel_is_taken_unless_the_user_chose(kind: str) -> None:
    assert create_optimizer(kind, parameters(), {}).param_groups[0]["fused"] is True
    assert not create_optimizer(kind, parameters(), {"foreach": True}).param_groups[0].get("fused")
    for given in ({"fused": False}, {"foreach": False}):
        assert not create_optimizer(kind, parameters(), given).param_groups[0].get("fused")
    meta = [nn.Parameter(torch.zeros(3, device="meta"))]
    assert not create_optimizer(kind, meta, {}).param_groups[0].get("fused")


def test_groups_keep_their_own_hyperparameters() -> None:
    first, second = parameters(2)
    groups = [{"params": [first], "lr": 0.1, "weight_decay": 0.5, "name": "decay"}, {"params": second}]
    opt = create_optimizer("Adam", groups, {"lr": 0.01, "betas": [0.8, 0.9]})
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in opt.param_groups] == [
        (0.1, 0.5, (0.8, 0.9)),
        (0.01, 0.0, (0.8, 0.9)),
    ]
    first.grad = second.grad = torch.ones(3)
    opt.step()
    before = torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(first.detach(), before * (1 - 0.1 * 0.5) - 0.1)
    torch.testing.assert_close(second.detach(), before - 0.01)


def test_lion_by_hand() -> None:
    (param,) = parameters()
    opt = create_optimizer("Lion", [param], {"lr": 0.1, "betas": [0.5, 0.75], "weight_decay": 0.2})
    param.grad = torch.tensor([0.5, -1.0, 0.0])
    opt.step()
    # decay: x * (1 - 0.1 * 0.2); sign(0.5 * 0 + 0.5 * g) = (1, -1, 0)
    torch.testing.assert_close(param.detach(), torch.tensor([0.98 - 0.1, -1.96 + 0.1, 2.94]))
    torch.testing.assert_close(opt.state[param]["exp_avg"], torch.tensor([0.125, -0.25, 0.0]))
    param.grad = torch.tensor([-0.1, 1.0, 1.0])
    opt.step()
    # 0.5 * m + 0.5 * g = (0.0125, 0.375, 0.5): signs + + +
    torch.testing.assert_close(param.detach(), torch.tensor([0.88, -1.86, 2.94]) * 0.98 - 0.1)
    torch.testing.assert_close(opt.state[param]["exp_avg"], torch.tensor([0.06875, 0.0625, 0.25]))


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "said"),
    [
        ("AdmW", {}, ConfigError, "unknown optimizer 'AdmW'. Did you mean 'AdamW'"),
        ("fusedthing", {}, ConfigError, "Known: "),
        (None, {}, ConfigError, "must be a string, got NoneType"),
        ("Adam", {"weight_decy": 0.1}, ConfigError, "'weight_decy'. Did you mean 'weight_decay'"),
        ("SGD", {"betas": [0.9, 0.9]}, ConfigError, "optimizer SGD: unknown parameter 'betas'"),
        ("Adam", {"params": []}, ConfigError, "unknown parameter 'params'"),
        ("Adam", {"lr": -1.0}, ConfigError, "optimizer Adam: Invalid learning rate: -1.0"),
        ("Adam", {"lr": "auto"}, ConfigError, "optimizer Adam"),
        ("Adam", {"adam_w_mode": "yes"}, ConfigError, "adam_w_mode must be true or false, got 'yes'"),
        ("AdamW", {"adam_w_mode": False}, ConfigError, "AdamW decouples"),
        ("Adam", {"max_grad_norm": 1.0}, ConfigError, "gradient_clipping"),
        ("Adam", {"bias_correction": False}, UnsupportedError, "bias_correction can only be True"),
        ("Adam", {"adam_w_mode": False, "set_grad_none": False}, UnsupportedError, "set_grad_none"),
        ("Lamb", {"amsgrad": True}, UnsupportedError, "amsgrad can only be False"),
        ("Lamb", {"min_coeff": 20.0}, ConfigError, "min_coeff 20.0"),
        ("Lamb", {"betas": [0.9]}, ConfigError, "two numbers"),
        ("Lion", {"lr": -1.0}, ConfigError, "lr -1.0"),
    ],
)
def test_what_a_file_can_say_wrong(kind: Any, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        create_optimizer(kind, parameters(), arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_deepspeeds_others_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"optimizer {name}: .*; .*use"):
        create_optimizer(name.lower(), parameters(), {})


def test_deepspeeds_switches_are_taken_at_the_values_they_have_here() -> None:
    given = {"bias_correction": True, "set_grad_none": True, "fp32_optimizer_states": True, "amsgrad": False}
    assert type(create_optimizer("Adam", parameters(), given)) is torch.optim.AdamW
    assert create_optimizer("Lamb", parameters(), {"amsgrad": False, "bias_correction": False})


@pytest.mark.parametrize("nothing", [[], [{"params": []}]])
def test_nothing_to_train(nothing: Any) -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        create_optimizer("Adam", nothing, {})


def test_one_tensor_is_no_list() -> None:
    with pytest.raises(ConfigError, match="an iterable of tensors"):
        create_optimizer("Adam", parameters()[0], {})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("Adam", "lr", -1.0), ("AdamW", "betas", [0.9, 1.5]), ("Adam", "eps", -1e-8), ("SGD", "momentum", -0.5),
     ("Lion", "lr", -1.0), ("Lamb", "betas", [0.9])],
)  # fmt: skip
def test_a_value_out_of_range_is_found_without_parameters_and_its_key_named(kind, key, value):
    with pytest.raises(ConfigError, match=f"^optimizer {kind}: |optimizer.params.{key}") as found:
        resolve_optimizer(kind, {"weight_decay": 0.1, key: value})
    assert f"optimizer.params.{key}." in str(found.value)
