"""What a model and an optimizer put into a checkpoint: tensors by plain names, and the facts beside them.

A model's tensor is called by its fully qualified name, without what wrappers add (``_orig_mod.``, ``module.``); an
optimizer's is ``optimizer//FQN//KEY``. A tied parameter is stored once, under its first name. Parameter groups are
stored by name too, so neither their order nor that of the parameters has to be the same at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dscompile.engine.checkpoint_format import Contents, decode, encode
from dscompile.engine.host_adam import HostStep
from dscompile.errors import CheckpointError
from dscompile.torch_compat import local_of

SEPARATOR = "//"
STATE = f"state{SEPARATOR}"
"""What the keys of a script's own tensors begin with."""
GROUPS = f"optimizer{SEPARATOR}groups{SEPARATOR}"
"""What the keys of tensors in an optimizer's groups begin with: a schedule may change them between steps."""
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model's tensors: parameters (DTensors where sharded) and persistent buffers, not copied.

    Attributes:
        tensors: by plain name, each once.
        ties: other names of a tensor -> the name it is stored under.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Collect them.

        Raises:
            CheckpointError: a name that a checkpoint cannot hold, or extra state that is no tensor.
        """
        tensors: dict[str, Tensor] = {}
        ties: dict[str, str] = {}
        first: dict[int, str] = {}
        for key, value in unwrap(model).state_dict(keep_vars=True).items():
            name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
            if SEPARATOR in name:
                raise CheckpointError(f"{name}: a name with {SEPARATOR!r} in it cannot be saved; rename the module.")
            if not isinstance(value, Tensor):
                if value is None:
                    continue
                raise CheckpointError(f"{name}: extra state of a module must be a tensor, not {type(value).__name__}.")
            known = first.setdefault(id(value), name)
            if known == name:
                tensors[name] = value
            else:
                ties[name] = known
        return cls(tensors, ties)

    def stored_name(self, name: str, contents: Contents) -> str:
        """The key under which a checkpoint holds the tensor called ``name`` here: ties may have another first name."""
        held = contents.tensors.state_dict_metadata
        if name in held:
            return name
        names = [name, *(other for other, known in self.ties.items() if known == name)]
        candidates = [*names, *(str(contents.facts["ties"].get(other)) for other in names)]
        return next((c for c in candidates if c in held), name)


def stored_model_keys(contents: Contents) -> list[str]:
    """The keys of model tensors in a checkpoint."""
    return [key for key in contents.tensors.state_dict_metadata if SEPARATOR not in key]


@dataclass(slots=True)
class OptimizerState:
    """An optimizer's state. ``facts`` is JSON: class, groups by parameter names, state that is no tensor."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: ModelState) -> OptimizerState:
        """Collect it, not copied.

        Raises:
            CheckpointError: a parameter that is not the model's, or state that a checkpoint cannot hold.
        """
        found = cls()
        names = _names(optimizer, model)
        groups = []
        for number, group in enumerate(optimizer.param_groups):
            values = {k: v for k, v in group.items() if k != "params"}
            encoded = encode(values, f"{GROUPS}{number}", found.tensors)
            groups.append({"names": [names[id(p)] for p in group["params"]], "values": encoded})
        state = {}
        for param, values in optimizer.state.items():
            if id(param) not in names:
                raise CheckpointError("the optimizer has state for a parameter that is in none of its groups.")
            for key in values:
                if not isinstance(key, str) or SEPARATOR in key:
                    raise CheckpointError(f"optimizer state {key!r} of {names[id(param)]}: not a name.")
            prefix = f"optimizer{SEPARATOR}{names[id(param)]}{SEPARATOR}"
            state[names[id(param)]] = {
                key: _encode_state(param, value, prefix + key, found.tensors) for key, value in values.items()
            }
        found.facts = {"class": _class_of(optimizer), "groups": groups, "state": state}
        return found


def _encode_state(param: Tensor, value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    local_shape = local_of(param).shape if isinstance(param, DTensor) else param.shape
    plain = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim > 0
    if plain and value.shape == local_shape != param.shape:
        raise CheckpointError(
            f"{where}: the optimizer keeps a plain tensor of the shard's shape {tuple(value.shape)}, of which a "
            "checkpoint cannot tell where it belongs in the whole; keep a DTensor like the parameter."
        )
    return encode(value, where, tensors)


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose states these are: of our implementation of one of PyTorch's classes, that class's."""
    return optimizer.stands_for if isinstance(optimizer, HostStep) else type(optimizer).__qualname__


def _names(optimizer: torch.optim.Optimizer, model: ModelState) -> dict[int, str]:
    by_id = {id(tensor): name for name, tensor in model.tensors.items()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) not in by_id:
                raise CheckpointError(
                    f"the optimizer has a parameter of shape {tuple(param.shape)} that is not the model's: make the "
                    "optimizer after distribute(), and give the model that holds all its parameters."
                )
    return {id(p): by_id[id(p)] for group in optimizer.param_groups for p in group["params"]}


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OptimizerLoad:
    """An optimizer's state on its way from a checkpoint: ``targets`` are filled, then :meth:`state_dict` is whole."""

    optimizer: torch.optim.Optimizer
    targets: dict[str, Tensor]
    groups: list[dict[str, Any]]
    state: dict[str, Any]
    names: dict[int, str]
    stored: dict[str, str]

    @classmethod
    def plan(cls, optimizer: torch.optim.Optimizer, model: ModelState, contents: Contents) -> OptimizerLoad:
        """Compare an optimizer with a checkpoint's and make empty tensors for what will be read.

        Raises:
            CheckpointError: no optimizer in the checkpoint, one of another class, or groups that do not fit.
        """
        facts = contents.facts["optimizer"]
        if facts is None:
            raise CheckpointError("the checkpoint holds no optimizer; load with load_optimizer=False.")
        if facts["class"] != _class_of(optimizer):
            raise CheckpointError(
                f"the checkpoint was saved with {facts['class']}, not {_class_of(optimizer)}; make that "
                "optimizer, or load with load_optimizer=False."
            )
        names = _names(optimizer, model)
        stored = {name: model.stored_name(name, contents) for name in names.values()}
        groups = _match_groups(optimizer, names, stored, facts["groups"])
        params = {stored[names[id(p)]]: p for group in optimizer.param_groups for p in group["params"]}
        targets: dict[str, Tensor] = {}
        for key in contents.tensors.state_dict_metadata:
            kind, _, rest = key.partition(SEPARATOR)
            name = rest.partition(SEPARATOR)[0]
            if kind == "optimizer" and (name in params or name == "groups"):
                targets[key] = empty_for(params.get(name), contents.tensor(key))
        return cls(optimizer, targets, groups, facts["state"], names, stored)

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's ``load_state_dict`` takes."""
        index, state, groups = 0, {}, []
        for group, values in zip(self.optimizer.param_groups, self.groups, strict=True):
            numbers = []
            for param in group["params"]:
                found = self.state.get(self.stored[self.names[id(param)]])
                if found is not None:
                    state[index] = decode(found, self.targets)
                numbers.append(index)
                index += 1
            ours = {k: v for k, v in group.items() if k != "params"}
            here = {k: v for k, v in ours.items() if k in ("fused", "foreach")}  # chosen for this device and run
            groups.append({**ours, **decode(values, self.targets), **here, "params": numbers})
        return {"state": state, "param_groups": groups}


def _match_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], stored: Mapping[str, str], saved: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved options of each present group: its parameters must have had equal ones."""
    where = {name: number for number, group in enumerate(saved) for name in group["names"]}
    matched = []
    for number, group in enumerate(optimizer.param_groups):
        wanted = [names[id(p)] for p in group["params"]]
        missing = [name for name in wanted if stored[name] not in where]
        if missing:
            raise CheckpointError(
                f"parameter {missing[0]} of the optimizer's group {number} was in no group of the saved optimizer"
                f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; load with load_optimizer=False."
            )
        sources = sorted({where[stored[name]] for name in wanted})
        values = [saved[source]["values"] for source in sources]
        if any(v != values[0] for v in values):
            raise CheckpointError(
                f"the optimizer's group {number} joins groups {', '.join(map(str, sources))} of the saved one, which "
                "had different options; group the parameters as they were, or load with load_optimizer=False."
            )
        matched.append(cast("dict[str, Any]", values[0]) if values else {})
    return matched


def empty_for(param: Tensor | None, found: TensorStorageMetadata) -> Tensor:
    """A tensor to read a stored one into: placed like ``param`` if it has its shape, else plain."""
    dtype = found.properties.dtype
    if param is not None and tuple(param.shape) == tuple(found.size):
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
    return torch.empty(found.size, dtype=dtype)


def compare(model: ModelState, contents: Contents, *, strict: bool) -> tuple[dict[str, str], list[str], list[str]]:
    """Which stored tensor goes where: (name here -> key there, names that are missing there, keys unused here).

    Raises:
        CheckpointError: shapes that differ, or with ``strict`` any name; it shows the first differing ones.
    """
    pairs: dict[str, str] = {}
    missing: list[str] = []
    held = contents.tensors.state_dict_metadata
    for name in model.tensors:
        key = model.stored_name(name, contents)
        if key in held:
            pairs[name] = key
        else:
            missing.append(name)
    there = {key: tuple(contents.tensor(key).size) for key in stored_model_keys(contents)}
    used = set(pairs.values())
    unused = [key for key in there if key not in used]
    here = {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}
    wrong = [name for name, key in pairs.items() if there[key] != here[name]]
    sizes = there | {name: there[key] for name, key in pairs.items()}
    text = differences(here, sizes, missing if strict else [], unused if strict else [], wrong, "checkpoint")
    if text:
        raise CheckpointError(f"the checkpoint is of another model: {text}.")
    return pairs, missing, unused


Shapes = Mapping[str, tuple[int, ...]]


def differences(here: Shapes, there: Shapes, missing: list[str], unused: list[str], wrong: list[str], what: str) -> str:
    """The first three differences between a model and a file of weights, with shapes; "" if there is none.

    ``missing`` are only here, ``unused`` only there, ``wrong`` have other shapes; ``what`` is the file called.
    """
    found = [f"{n} is {list(here[n])} here and {list(there[n])} there" for n in wrong]
    found += [f"{n} {list(here[n])} is only in the model" for n in missing]
    found += [f"{n} {list(there[n])} is only in the {what}" for n in unused]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
