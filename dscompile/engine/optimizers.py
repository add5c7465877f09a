"""Optimizers by the names of DeepSpeed's configuration, and every elementwise one of ``torch.optim`` by its own.

Three of DeepSpeed's habits are kept, because a configuration that is carried over means them:

- ``Adam`` decouples its weight decay (it is AdamW) unless ``adam_w_mode`` is false.
- Weight decay defaults to 0 for ``Adam`` and ``AdamW``; PyTorch's AdamW has 0.01. With ``torch_adam`` PyTorch's own
  class is meant, with its defaults.
- ``max_grad_norm`` is no optimizer parameter.

A sharded parameter is a DTensor, and the update of an elementwise optimizer is the same on a shard; any other is
refused there. PyTorch's fused kernel is taken where it has one for the device; for DTensors it has Adam's only
(torch 2.13), and the others' sweeps over all tensors are taken. Adam and AdamW of masters whose model computes in 16
bits on a CPU are those of :mod:`dscompile.engine.host_adam`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dscompile.engine.adam_kernel import adam_kernel
from dscompile.engine.arguments import accepted, build, check_keys, find_name
from dscompile.engine.host_adam import HostAdam, HostAdamW
from dscompile.engine.lamb import WORTH, Lamb
from dscompile.engine.lion import Lion
from dscompile.errors import ConfigError, UnsupportedError
from dscompile.placement import spec_of

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]

ELEMENTWISE: tuple[type[Optimizer], ...] = (
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW),
    *(torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.SGD, Lion, Lamb),
)
"""Their update of a shard is the shard of their update (LAMB: its norms are summed over ranks)."""

WHOLE_ONLY: Mapping[type[Optimizer], str] = {
    torch.optim.LBFGS: "its line search depends on all parameters at once",
    torch.optim.Muon: "it orthogonalises whole matrices",
    torch.optim.Adafactor: "it keeps row and column means of whole matrices",
    torch.optim.SparseAdam: "it needs sparse gradients, and sharded ones are dense",
    torch.optim.Rprop: "PyTorch 2.13 has no DTensor rule for the operators it uses",
}
"""Optimizers for parameters that are not sharded, and why."""

_COMPRESSED = (
    "it sends compressed gradients in place of the reduction that the compiler plans, and DeepSpeed itself refuses it "
    "with ZeRO; use {0}, whose steps are the same before its freeze_step"
)
_MUP = "it needs the shapes that the mup package attaches to parameters; scale lr by parameter groups and use {0}"

REFUSED: Mapping[str, str] = {
    "OneBitAdam": _COMPRESSED.format("Adam"),
    "ZeroOneAdam": _COMPRESSED.format("Adam"),
    "OneBitLamb": _COMPRESSED.format("Lamb"),
    "MuAdam": _MUP.format("Adam"),
    "MuAdamW": _MUP.format("AdamW"),
    "MuSGD": _MUP.format("SGD"),
}
"""Names that DeepSpeed has and we do not, and why."""

_BY_NAME: Mapping[str, type[Optimizer]] = {cls.__name__: cls for cls in (*ELEMENTWISE, *WHOLE_ONLY)}

# Devices with a fused kernel; for DTensors, whether PyTorch knows how to run it on shards.
_FUSED: Mapping[type[Optimizer], tuple[tuple[str, ...], bool]] = {
    torch.optim.Adam: (("cpu", "cuda"), True),
    torch.optim.AdamW: (("cpu", "cuda"), True),
    torch.optim.SGD: (("cpu", "cuda"), False),
    torch.optim.Adagrad: (("cpu",), False),
}


@dataclass(frozen=True)
class _Switch:
    """A parameter of DeepSpeed's own classes that has one value here."""

    value: Any
    reason: str


_SET_TO_NONE = _Switch(True, "gradients are always set to None, not to zeros")
_SWITCHES: Mapping[type[Optimizer], Mapping[str, _Switch]] = {
    torch.optim.AdamW: {
        "bias_correction": _Switch(True, "PyTorch's Adam always corrects its averages' bias"),
        "fp32_optimizer_states": _Switch(True, "states have the master parameters' dtype, which is fp32"),
        "set_grad_none": _SET_TO_NONE,
    },
    Lion: {"set_grad_none": _SET_TO_NONE, "fp32_optimizer_states": _Switch(True, "states have the masters' dtype")},
    Lamb: {"amsgrad": _Switch(False, "LAMB has no AMSGrad variant, in DeepSpeed neither")},
}


def create_optimizer(kind: str, parameters: Parameters, arguments: Mapping[str, Any] | None = None) -> Optimizer:
    """Make the optimizer that ``{"type": kind, "params": arguments}`` of a DeepSpeed configuration means.

    Args:
        kind: its name in any case: ``Adam``, ``AdamW``, ``Lamb``, ``Lion``, ``Adagrad``, ``SGD``, ... (:data:`REFUSED`
            lists DeepSpeed's that do not exist here).
        parameters: parameters, or groups of them with hyperparameters of their own; plain tensors or the DTensors of a
            distributed model.
        arguments: the constructor's keyword arguments, lists for tuples allowed.

    Raises:
        ConfigError: an unknown name or key (with the nearest one), a value out of range, or no parameter to train.
        UnsupportedError: a name or value of DeepSpeed's that does not exist here, or an optimizer that would compute
            something else on shards.
    """
    name, cls, given = resolve_optimizer(kind, arguments)
    groups = _groups(parameters, name)
    _check_shards(cls, name, groups)
    made = _choose_implementation(cls, groups, given)
    return build(f"optimizer {name}", lambda: _make(made, groups, given), given)


def resolve_optimizer(
    kind: str, arguments: Mapping[str, Any] | None = None
) -> tuple[str, type[Optimizer], dict[str, Any]]:
    """The optimizer's name, its class, and the arguments that the class takes; nothing is made.

    Raises:
        ConfigError: an unknown name or key (with the nearest one), or a value out of range.
        UnsupportedError: a name or value of DeepSpeed's that does not exist here.
    """
    name = find_name("optimizer", kind, (*_BY_NAME, *REFUSED))
    if name in REFUSED:
        raise UnsupportedError(f"optimizer {name}: {REFUSED[name]}.")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in (arguments or {}).items()}
    if "max_grad_norm" in given:
        raise ConfigError(f"optimizer {name}: max_grad_norm is no optimizer parameter; set gradient_clipping instead.")
    cls = _resolve(name, given)
    check_keys(f"optimizer {name}", given, accepted(cls))
    _check_values(name, cls, given)
    return name, cls, given


def _check_values(name: str, cls: type[Optimizer], given: Mapping[str, Any]) -> None:
    """Make the optimizer of one number, so that a value out of range is found before a model is moved or sharded.

    Raises:
        ConfigError: names the key, if one alone is at fault.
    """
    made = {key: value for key, value in given.items() if key not in ("fused", "foreach")}  # of the device, not values

    def make(values: Mapping[str, Any]) -> Optimizer:
        return _make(cls, [{"params": [torch.zeros(1, 1, requires_grad=True)]}], values)

    try:
        build(f"optimizer {name}", lambda: make(made), given)
    except ConfigError as error:
        for key, value in made.items():
            try:
                make({key: value})
            except (TypeError, ValueError):  # a ConfigError is a ValueError
                raise ConfigError(f"{error} The key at fault: optimizer.params.{key}.") from error
        raise


def _make(cls: Callable[..., Optimizer], groups: list[dict[str, Any]], given: Mapping[str, Any]) -> Optimizer:
    return cls(groups, **given)


def _groups(parameters: Parameters, name: str) -> list[dict[str, Any]]:
    """The parameters as a list of groups. Raises :class:`ConfigError` if there is none to train."""
    if isinstance(parameters, Tensor):
        raise ConfigError(f"optimizer {name}: parameters must be an iterable of tensors, got one tensor.")
    listed: list[Any] = list(parameters)
    groups = [dict(g) for g in listed] if listed and isinstance(listed[0], dict) else [{"params": listed}]
    for group in groups:
        params = group.get("params", ())
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
    if not any(group["params"] for group in groups):
        raise ConfigError(f"optimizer {name}: no parameters; are all of them frozen?")
    return groups


def _resolve(name: str, given: dict[str, Any]) -> type[Optimizer]:
    """The class a name means; removes from ``given`` the keys that only DeepSpeed has, and adds its defaults."""
    cls = _BY_NAME[name]
    if name in ("Adam", "AdamW"):
        decoupled = _flag(name, given, "adam_w_mode", True)
        if name == "AdamW" and not decoupled:
            raise ConfigError(
                "optimizer AdamW: adam_w_mode is false, but AdamW decouples its weight decay; for L2 decay write "
                '"type": "Adam" with "adam_w_mode": false.'
            )
        cls = torch.optim.AdamW if decoupled else torch.optim.Adam
        if not _flag(name, given, "torch_adam", False):
            given.setdefault("weight_decay", 0.0)
    for key, switch in _SWITCHES.get(torch.optim.AdamW if cls is torch.optim.Adam else cls, {}).items():
        if given.pop(key, switch.value) != switch.value:
            raise UnsupportedError(f"optimizer {name}: {key} can only be {switch.value} here: {switch.reason}.")
    return cls


def _flag(name: str, given: dict[str, Any], key: str, default: bool) -> bool:
    value = given.pop(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"optimizer {name}: {key} must be true or false, got {value!r}.")
    return value


def _check_shards(cls: type[Optimizer], name: str, groups: list[dict[str, Any]]) -> None:
    if cls not in WHOLE_ONLY:
        return
    for param in (p for group in groups for p in group["params"]):
        spec = spec_of(param)
        if (spec is not None and spec.stage > 0) or (
            isinstance(param, DTensor) and any(placement.is_shard() for placement in param.placements)
        ):
            where = f" ({spec.fqn} is sharded at stage {spec.stage})" if spec is not None else ""
            raise UnsupportedError(
                f"optimizer {name} cannot update shards{where}: {WHOLE_ONLY[cls]}. Use an elementwise optimizer "
                "(AdamW, SGD, ...), Lamb, or ZeRO stage 0."
            )


_HOST: Mapping[type[Optimizer], type[Optimizer]] = {torch.optim.Adam: HostAdam, torch.optim.AdamW: HostAdamW}


def _choose_implementation(
    cls: type[Optimizer], groups: list[dict[str, Any]], given: dict[str, Any]
) -> type[Optimizer]:
    """Take our own Adam where it applies, else PyTorch's fused kernel or sweep over all tensors on shards.

    Unless the user chose an implementation. PyTorch would loop over DTensors, at five times the cost of small ones.
    """
    chosen = any(given.get(key) is not None for key in ("fused", "foreach"))
    if chosen or given.get("capturable") or given.get("differentiable"):
        return cls
    params = [p for group in groups for p in group["params"]]
    variant = any(group.get(key) for group in (given, *groups) for key in ("amsgrad", "maximize"))
    if cls in _HOST and not variant and _worth_a_kernel(params) and adam_kernel() is not None:
        return _HOST[cls]
    plain = not any(isinstance(p, DTensor) for p in params)
    devices, on_shards = _FUSED.get(cls, ((), False))
    if (plain or on_shards) and all(p.is_floating_point() and p.device.type in devices for p in params):
        given["fused"] = True
    elif not plain and cls in ELEMENTWISE and "foreach" in accepted(cls):
        given["foreach"] = True
    return cls


def _worth_a_kernel(params: list[Tensor]) -> bool:
    """Whether these are masters on a CPU of a model that computes in 16 bits, and enough to build a kernel for."""
    specs = [spec_of(p) for p in params]
    half = all(spec is not None and spec.dtype is not None for spec in specs)
    # Of whole parameters: every rank must choose alike.
    return half and all(p.device.type == "cpu" for p in params) and sum(p.numel() for p in params) >= WORTH
