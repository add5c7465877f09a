"""The class of a module with sharded parameters: a subclass of the user's, in which they are properties.

A property rather than ``__getattr__``, because Dynamo inlines it, so one ``dscompile::unshard`` node stands in the
graph for each read. The class also keeps the shards whole through ``.to()``, ``load_state_dict``, ``deepcopy`` and
pickling, and refuses what would lose one. Gradient accumulation changes the class, not a flag: Dynamo guards on a
module's class anyway, so the three variants cost no further guards.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dscompile.config import Config
from dscompile.errors import ShardingError
from dscompile.guard import Gathered
from dscompile.ops import unshard
from dscompile.placement import ShardSpec
from dscompile.slots import Slot, attribute_keys, slot_of
from dscompile.torch_compat import never_a_frame
from dscompile.world import World

STATE = "_dscompile"
FOREIGN = "_dscompile_foreign"
_MARKER = torch.ops.dscompile.unshard.default

Tail = tuple[Any, ...]
"""``dim, size, world, group`` and, where they matter, ``dtype, wire, tile``: the constants of a parameter's marker."""


class Sync(enum.Enum):
    """Where a read parameter's gradient goes."""

    REDUCE = "reduce"
    """Reduced at once."""
    LOCAL = "local"
    """Accumulated in full, not reduced: inside ``no_sync``."""
    BOUNDARY = "boundary"
    """Reduced together with what was accumulated."""


@dataclass
class Shards:
    """What a module knows of its sharded parameters; pickled without its slots."""

    specs: dict[str, ShardSpec]
    config: Config
    slots: dict[str, Slot] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.specs, self.config)


class ParameterTable(dict[str, nn.Parameter | None]):
    """A module's ``_parameters``: notes values that do not belong there, as ``torch.func.functional_call`` puts them.

    Graphs read a parameter's slot, not this table, so a write that only the table sees would be ignored. Dynamo traces
    the method below, so it holds for a ``functional_call`` inside compiled code as well as around it.
    """

    def __init__(self, values: dict[str, nn.Parameter | None], shards: Shards, foreign: dict[str, Any]) -> None:
        dict.__init__(self, values)
        self.shards = shards
        self.foreign = foreign

    def __setitem__(self, name: str, value: Any) -> None:
        dict.__setitem__(self, name, value)
        slot = self.shards.slots.get(name)
        if slot is None or slot.param is value:
            self.foreign.pop(name, None)
        else:
            self.foreign[name] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (list(self.items()),)


def shards_of(module: nn.Module) -> Shards | None:
    """What a module knows of its own sharded parameters (not its children's), or None."""
    found = module.__dict__.get(STATE)
    return found if isinstance(found, Shards) else None


def sharded_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below (and including) ``module`` that hold sharded parameters."""
    return (m for m in module.modules() if shards_of(m) is not None)


def slots_in(module: nn.Module) -> list[Slot]:
    """The slots of all sharded parameters below ``module``, each once, in ``named_parameters()`` order."""
    found = {id(s): s for m in sharded_modules(module) for s in cast(Shards, shards_of(m)).slots.values()}
    return list(found.values())


def adopt(module: nn.Module, name: str, param: DTensor, spec: ShardSpec, config: Config) -> None:
    """Make ``param`` the module's sharded parameter ``name``: the module's class changes to one that knows it."""
    shards = shards_of(module)
    if shards is None:
        shards = module.__dict__[STATE] = Shards({}, config)
        _tabulate(module, shards)
    module._parameters[name] = cast(nn.Parameter, param)
    for key in ("_flat_weights", "_flat_weight_refs") if isinstance(module, nn.RNNBase) else ():
        module.__dict__.pop(key, None)  # full copies; the class computes them
    shards.specs[name] = spec
    _attach(module, name, param)
    set_variant(module, Sync.REDUCE)


def _tabulate(module: nn.Module, shards: Shards) -> None:
    foreign: dict[str, Any] = {}
    module.__dict__[FOREIGN] = foreign
    module.__dict__["_parameters"] = ParameterTable(module._parameters, shards, foreign)


def adopt_containers(model: nn.Module) -> None:
    """Let the modules above sharded ones reach into these (:func:`container_class`)."""
    for module in model.modules():
        if shards_of(module) is None and slots_in(module) and not hasattr(type(module), "_dscompile_base"):
            module.__class__ = cast(Any, container_class)(type(module))


def _attach(module: nn.Module, name: str, param: DTensor) -> None:
    shards = cast(Shards, shards_of(module))
    slot = slot_of(param)
    if slot is None or slot.param is not param:
        slot = Slot(param, shards.specs[name], shards.config)
    shards.slots[name] = slot
    module.__dict__[FOREIGN].pop(name, None)
    slot.own(module, name)


def _release(module: nn.Module, name: str) -> None:
    """Forget a sharded parameter, which the user replaced by None or by a plain one."""
    shards = cast(Shards, shards_of(module))
    for table in (shards.specs, shards.slots, module.__dict__[FOREIGN]):
        table.pop(name, None)
    for key in attribute_keys(name):
        module.__dict__.pop(key, None)
    set_variant(module, Sync.REDUCE)


def set_variant(module: nn.Module, sync: Sync) -> None:
    """Give the module the class for its sharded parameters and a kind of gradient."""
    base = type(module)
    base = getattr(base, "_dscompile_base", base)
    specs = cast(Shards, shards_of(module)).specs
    layout = tuple((name, _tail(spec)) for name, spec in specs.items())
    module.__class__ = cast(type[nn.Module], cast(Any, sharded_class)(base, layout, sync))


def _tail(spec: ShardSpec) -> Tail:
    """The marker's arguments after the tensors; without dtypes where the model computes in its masters' own."""
    plain = (spec.dim, spec.size, spec.world, spec.group)
    if spec.tile is not None:
        return *plain, spec.dtype, spec.wire, spec.tile_argument
    return plain if spec.dtype is None and spec.wire is None else (*plain, spec.dtype, spec.wire)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(module: nn.Module, name: str, sync: Sync) -> Tensor | None:
    """An eager read: renews a stale slot, counts, gathers, guards."""
    param = module._parameters.get(name)
    if param is None:
        return None
    shards = cast(Shards, shards_of(module))
    slot = shards.slots.get(name)
    if slot is None or slot.param is not cast(Tensor, param):
        return _foreign(param, shards.specs[name])
    if slot.full is not None and (slot.writable or not torch.is_grad_enabled()):
        return slot.full if slot.writable else slot.full.as_subclass(Gathered)
    if slot.stale:
        slot.renew()
    slot.reads += 1
    value = slot.gather(to_leaf=sync is Sync.LOCAL, boundary=sync is Sync.BOUNDARY)
    return value.as_subclass(Gathered)


def _foreign(param: Tensor, spec: ShardSpec) -> Tensor:
    """A value put there for a moment (``torch.func.functional_call``): a full tensor, or a DTensor placed alike."""
    if isinstance(param, DTensor):
        constants = spec.dim, spec.size, spec.world, spec.group, None, None, spec.dtype, spec.wire, spec.tile_argument
        return unshard(param.to_local(), *constants)
    return param if spec.dtype is None else param.to(spec.dtype)


def _property(name: str, tail: Tail, sync: Sync) -> property:
    """The property of one parameter. Dynamo traces the first branch: keep it short, it is paid for every parameter.

    Dynamo traces a ``typing.cast`` as a call of a Python function of its own: hence the typed variables instead.
    """
    compiling, marker = torch.compiler.is_compiling, _MARKER

    dtype = tail[4] if len(tail) > 4 else None

    def given(self: Any) -> Tensor | None:
        value: Tensor = self._dscompile_foreign[name]
        if isinstance(value, DTensor):
            full: Tensor = marker(value.to_local(), None, None, *tail)
            return full
        return value if dtype is None else value.to(dtype)

    shard, silent, leaf, offered, taken = attribute_keys(name)

    def reduce(self: Any) -> Tensor | None:
        if compiling():
            if self._dscompile_foreign and name in self._dscompile_foreign:
                return given(self)
            full: Tensor = marker(getattr(self, shard), None, None, *tail)
            return full
        return _read(self, name, sync)

    def local(self: Any) -> Tensor | None:
        if compiling():
            if self._dscompile_foreign and name in self._dscompile_foreign:
                return given(self)
            full: Tensor = marker(getattr(self, silent), getattr(self, leaf), None, *tail)
            return full
        return _read(self, name, sync)

    def boundary(self: Any) -> Tensor | None:
        if compiling():
            if self._dscompile_foreign and name in self._dscompile_foreign:
                return given(self)
            if getattr(self, taken):
                return local(self)
            full: Tensor = marker(getattr(self, shard), None, getattr(self, offered), *tail)
            return full
        return _read(self, name, sync)

    def refuse(self: nn.Module, *_: Any) -> NoReturn:
        raise ShardingError(
            f"{_where(self, name)} is sharded and cannot be replaced by a computed value: register parametrizations "
            "(weight_norm, ...) before distribute()."
        )

    never_a_frame(reduce, local, boundary, _read)
    return property({Sync.REDUCE: reduce, Sync.LOCAL: local, Sync.BOUNDARY: boundary}[sync], refuse)


def _where(module: nn.Module, name: str) -> str:
    spec = cast(Shards, shards_of(module)).specs.get(name)
    return f"parameter {spec.fqn if spec else name!r} of {type(module).__name__}"


# -- the class ---------------------------------------------------------------------------------------------------------

Layout = tuple[tuple[str, Tail], ...]


@functools.cache
def sharded_class(base: type[nn.Module], layout: Layout, sync: Sync) -> type[nn.Module]:
    """The subclass of ``base`` whose parameters ``layout`` (name, the marker's constants) are sharded."""
    if not layout:
        return base
    members: dict[str, Any] = {entry[0]: _property(*entry, sync) for entry in layout}
    members |= _reaching_methods(base) | _methods(base)
    members |= {"_dscompile_base": base, "_dscompile_layout": layout, "_dscompile_sync": sync}
    members |= {"__module__": base.__module__}
    members |= {"__qualname__": base.__qualname__, "__doc__": base.__doc__}
    if issubclass(base, nn.RNNBase):
        members |= _rnn_members()
    return type(base.__name__, (base,), members)


@functools.cache
def container_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` for a module that holds sharded parameters only through its children."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _revive_container, (base,), cast(Any, self).__getstate__()

    members: dict[str, Any] = {**_reaching_methods(base), "__reduce_ex__": reduce, "_dscompile_base": base}
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)


def _revive_container(base: type[nn.Module]) -> nn.Module:
    cls: type[nn.Module] = cast(Any, container_class)(base)
    return cls.__new__(cls)


def _reaching_methods(base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods of ``nn.Module`` that reach into children, for modules with sharded parameters anywhere below."""

    def get_parameter(self: nn.Module, target: str) -> nn.Parameter:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        shards = shards_of(owner)
        if shards is not None and name in shards.slots:  # not the attribute, which is the gathered value
            return cast(nn.Parameter, owner._parameters[name])
        return base.get_parameter(self, target)

    def requires_grad_(self: nn.Module, requires_grad: bool = True) -> nn.Module:
        base.requires_grad_(self, requires_grad)
        for slot in slots_in(self):
            if slot.stale:
                slot.renew()
        return self

    return {"get_parameter": get_parameter, "requires_grad_": requires_grad_}


def _methods(base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What a module does differently when it holds shards. Each defers to ``base``."""

    def delete(self: nn.Module, name: str) -> None:
        if name in cast(Shards, shards_of(self)).specs:
            raise ShardingError(
                f"{_where(self, name)} is sharded and cannot be deleted: register parametrizations (weight_norm, ...) "
                "before distribute()."
            )
        base.__delattr__(self, name)

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        spec = cast(Shards, shards_of(self)).specs.get(name)
        base.register_parameter(self, name, param)
        if spec is None:
            return
        if isinstance(param, DTensor) and tuple(param.shape) == spec.shape:
            _attach(self, name, param)
        else:  # a plain one is not sharded: check_plain() names it
            _release(self, name)

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # A DTensor is moved by swapping it with its converted self, which nobody else may refer to meanwhile.
        shards = cast(Shards, shards_of(self))
        slots, shards.slots = shards.slots, {}
        for slot in slots.values():
            slot.release()
        base._apply(self, fn, recurse)
        for name, slot in slots.items():
            slot.renew(cast(DTensor, self._parameters[name]))
            shards.slots[name] = slot
        return self

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, slot in cast(Shards, shards_of(self)).slots.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and not isinstance(given, DTensor) and tuple(given.shape) == slot.spec.shape:
                state_dict[prefix + name] = slot.shard_from(given)
        base._load_from_state_dict(self, state_dict, prefix, *args)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = dict(cast(dict[str, Any], self.__getstate__()))
        state.pop(FOREIGN, None)
        state["_parameters"] = dict(self._parameters)
        for name in cast(Shards, shards_of(self)).specs:
            for key in attribute_keys(name):
                state.pop(key, None)
        return _revive, (base, cast(Any, type(self))._dscompile_layout), state

    def revive(self: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        _tabulate(self, cast(Shards, shards_of(self)))
        for name in cast(Shards, shards_of(self)).specs:
            param = cast(DTensor, self._parameters[name])
            World.of(param.device_mesh)
            _attach(self, name, param)

    return {
        "__delattr__": delete,
        "register_parameter": register,
        "_apply": apply,
        "_load_from_state_dict": load,
        "__reduce_ex__": reduce,
        "__setstate__": revive,
    }


def _revive(base: type[nn.Module], layout: Layout) -> nn.Module:
    cls: type[nn.Module] = cast(Any, sharded_class)(base, layout, Sync.REDUCE)
    return cls.__new__(cls)


def _rnn_members() -> dict[str, Any]:
    """An RNN keeps a list of its weights, which would keep full copies alive: gather them at each use instead."""

    def weights(self: Any) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def ignore(self: Any, value: Any) -> None:
        """RNNBase rebuilds its list after ``.to()`` and unpickling."""

    return {
        "_flat_weights": property(weights, ignore),
        "_flat_weight_refs": property(lambda self: [], ignore),
        "_weights_have_changed": lambda self: False,
    }
