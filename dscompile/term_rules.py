"""What terms are, and the rules that make different spellings of one value the same term.

Each rule is *bitwise*: both sides compute the same bits, in the same layout where a kernel's summation order could
depend on it. A new operator adds an entry to :data:`RULES`; ``tests/test_equivalence.py`` executes both sides of each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from dscompile.comm_terms import COMM_RULES, Several, cast_term
from dscompile.effects import dropout_scale, is_plain
from dscompile.torch_compat import OpOverload, is_backed, symbolic_expression

aten = torch.ops.aten


class Term:
    """One interned value. ``op`` is the whole key ``(operator, arguments...)``; equality is identity.

    ``node`` is the first node that had this value (for messages), ``value`` its fake value (for shapes), ``index`` the
    order of creation, ``unknown`` whether something that equals nothing is inside.
    """

    __slots__ = ("index", "node", "op", "unknown", "value")

    def __init__(self, op: tuple[Any, ...], node: fx.Node | None, index: int, unknown: bool, value: Any) -> None:
        """Made by :meth:`TermTable.intern` only."""
        self.op = op
        self.node = node
        self.index = index
        self.unknown = unknown
        self.value = value


Key = Any
"""An operand: a :class:`Term`, a typed constant such as ``(int, 1)``, or a tuple of operands."""


class Op:
    """An operator as the head of a term, with what evaluation asks of it.

    There is one for each operator and table, and it hashes by identity; an operator overload hashes in Python.
    """

    __slots__ = ("creates", "plain", "rule", "symbolic", "target")

    def __init__(self, target: Any) -> None:
        self.target = target
        self.rule: Rule | None = None
        self.plain = is_plain(target)
        self.creates = False
        self.symbolic = not isinstance(target, OpOverload)
        if target is operator.getitem:
            self.rule = _getitem
        if isinstance(target, OpOverload):
            schema = target._schema
            self.rule = RULES.get(target)
            self.creates = not any("Tensor" in str(a.type) for a in schema.arguments)
            self.symbolic = any(str(r.type) in ("int", "SymInt") for r in schema.returns)

    def __str__(self) -> str:
        return str(getattr(self.target, "__name__", self.target))


class TermTable:
    """The intern table of one proof: equal keys give the same :class:`Term`."""

    def __init__(self) -> None:
        """An empty table."""
        self._terms: dict[tuple[Any, ...], Term] = {}
        self._ops: dict[int, Op] = {}
        self._unknown = False  # nothing unknown was met so far: no need to look for it
        self._ruled: dict[tuple[Key, ...], Key] = {}
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        """How many different terms there are."""
        return len(self._terms)

    def op(self, target: Any) -> Op:
        """The head of terms that call ``target``."""
        op = self._ops.get(id(target))
        if op is None:
            op = self._ops[id(target)] = Op(target)
        return op

    def intern(self, key: tuple[Any, ...], node: fx.Node | None, value: Any = None) -> Term:
        """The term of ``key``, made on first use; its fake value is ``node``'s unless ``value`` is given."""
        term = self._terms.get(key)
        if term is None:
            if value is None and node is not None:
                value = node.meta.get("val")
            term = Term(key, node, len(self._terms), self._unknown and _unknown_inside(key), value)
            self._terms[key] = term
        return term

    def ruled(self, rule: Rule, key: tuple[Key, ...], positional: int, node: fx.Node) -> Key:
        """The term of a call that ``rule`` may rewrite; answers are kept: a rule runs once for equal calls."""
        result = self._ruled.get(key)
        if result is None:
            result = rule(self, key[1 : positional + 1], dict(key[positional + 1 :]), node)
            if result is None:
                result = self.intern(key, node)
            self._ruled[key] = result
        return result

    def opaque(self, node: fx.Node) -> Term:
        """A fresh term that equals nothing, itself of another evaluation included."""
        self._unknown = True
        return Term(("unknown", node.name), node, -1, True, node.meta.get("val"))

    def identity(self, value: object) -> int:
        """A number for an object; the object is kept alive, so the number stays its own."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return number

    def size(self, size: Any) -> Key:
        """A size: a constant, or the term of its expression (``s0 * 2`` is one term however computed)."""
        if isinstance(size, int):
            return (int, size)
        expression = symbolic_expression(size)
        if expression.is_Integer:
            return (int, int(expression))
        return self.intern(("symbol", expression), None)

    def backed_size(self, size: torch.SymInt) -> Key | None:
        """Like :meth:`size`, or None for a size that depends on data: two of those are never assumed equal."""
        return self.size(size) if is_backed(size) else None

    def shape(self, value: Any) -> tuple[Key, ...]:
        """The shape of a fake tensor as operands."""
        return tuple([(int, s) if type(s) is int else self.size(s) for s in value.shape])

    def strides(self, value: torch.Tensor) -> tuple[Key, ...]:
        """The strides of a fake tensor as operands."""
        return tuple([self.size(s) for s in value.stride()])

    def same_type(self, left: Any, right: Any) -> bool:
        """Whether two fake tensors have the same dtype, device, shape and strides."""
        return (
            isinstance(left, torch.Tensor)
            and isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.device == right.device
            and left.layout == right.layout == torch.strided
            and self.shape(left) == self.shape(right)
            and self.strides(left) == self.strides(right)
        )


def _unknown_inside(key: tuple[Any, ...]) -> bool:
    for part in key:
        if type(part) is Term:
            if part.unknown:
                return True
        elif isinstance(part, tuple) and _unknown_inside(part):
            return True
    return False


Rule = Callable[[TermTable, tuple[Key, ...], Mapping[str, Key], fx.Node], Key | None]
"""``rule(table, args, kwargs, node)`` gives the term of a call, or None to hash it as it is written."""


def _getitem(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """One of several results whose terms are known."""
    values, index = args
    if isinstance(values, Several) and index[0] is int and 0 <= index[1] < len(values):
        return values[index[1]]
    return _dropped(table, values, node) if index == (int, 0) else None


def _dropped(table: TermTable, drawn: Key, node: fx.Node) -> Key | None:
    """What ``native_dropout`` leaves of ``x`` is ``x * mask * scale``, on CPUs, where it computes just that."""
    if not isinstance(drawn, Term) or len(drawn.op) != 5 or not isinstance(drawn.value, tuple):
        return None
    head, x, rate, train, _ = drawn.op
    made = node.meta.get("val")
    if not isinstance(head, Op) or head.target is not aten.native_dropout.default or rate[0] is not float:
        return None
    if not isinstance(made, torch.Tensor) or made.device.type != "cpu":
        return None
    scale = dropout_scale(float(rate[1]), train[1], made.dtype)
    if scale is None:
        return None
    mask = table.intern((table.op(operator.getitem), drawn, (int, 1)), node, drawn.value[1])
    kept = table.intern((table.op(aten.mul.Tensor), x, mask), node)
    return table.intern((table.op(aten.mul.Scalar), kept, (float, repr(scale))), node)


def _identity(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``alias(x)``, ``detach(x)`` are x."""
    return args[0]


def _same_layout(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``clone(x)``, ``contiguous(x)``, ``_to_copy(x)``, ``expand(x, own shape)`` that change nothing are x."""
    source = args[0]
    if isinstance(source, Term) and table.same_type(source.value, node.meta.get("val")):
        return source
    return None


def _to_copy(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``_to_copy(x)`` that changes nothing is x; a change of dtype alone commutes with gathering a parameter."""
    source, made = args[0], node.meta.get("val")
    same = _same_layout(table, args, {}, node)
    if same is not None or set(kwargs) != {"dtype"} or not isinstance(source, Term):
        return same
    if not isinstance(source.value, torch.Tensor) or not isinstance(made, torch.Tensor):
        return None
    if source.value.layout is not torch.strided or table.strides(source.value) != table.strides(made):
        return None
    return cast_term(table, source, kwargs["dtype"][1], node)


def _view(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """A view of a view is one view; a view to the own shape is no view. Values in order do not change."""
    base, size = args[0], args[1] if len(args) > 1 else kwargs.get("size", kwargs.get("shape"))
    if not isinstance(base, Term) or not isinstance(size, tuple):
        return None
    if (int, -1) in size:
        size = table.shape(node.meta["val"])
    if base.op[0] == "view":
        base = base.op[1]
    if isinstance(base.value, torch.Tensor) and table.shape(base.value) == size:
        return base
    return table.intern(("view", base, size), node)


def _permuted(table: TermTable, base: Key, order: tuple[int, ...], node: fx.Node) -> Key | None:
    """A permutation of a permutation is one permutation; the identity is none."""
    if not isinstance(base, Term):
        return None
    if base.op[0] == "permute":
        inner = base.op[2]
        base, order = base.op[1], tuple(inner[i] for i in order)
    if order == tuple(range(len(order))):
        return base
    return table.intern(("permute", base, order), node)


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _permute(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``permute(x, dims)``."""
    dims = args[1] if len(args) > 1 else kwargs.get("dims")
    if not isinstance(dims, tuple):
        return None
    rank = len(dims)
    return _permuted(table, args[0], tuple(d[1] % rank for d in dims), node)


def _transpose(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``transpose(x, a, b)`` is a permutation."""
    if len(args) != 3 or isinstance(args[1], Term) or isinstance(args[2], Term):
        return None
    order = list(range(_rank(node)))
    if order:
        a, b = args[1][1] % len(order), args[2][1] % len(order)
        order[a], order[b] = order[b], order[a]
    return _permuted(table, args[0], tuple(order), node)


def _t(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``t(x)`` swaps two dimensions, and leaves fewer alone."""
    return _permuted(table, args[0], tuple(reversed(range(_rank(node)))), node)


def _commutative(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``a + b`` is ``b + a`` bit for bit; an ``alpha`` other than 1 scales only the second, so it stays as written."""
    if len(args) != 2 or kwargs.get("alpha", (int, 1)) != (int, 1) or set(kwargs) - {"alpha"}:
        return None
    left, right = args
    if isinstance(left, Term) and isinstance(right, Term):
        if right.index < left.index:
            left, right = right, left
        return table.intern((table.op(node.target), left, right), node)
    return table.intern((table.op(node.target), *args), node) if kwargs else None


def _times_one(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``x * 1`` and ``x / 1`` are x if the type stays (adding 0 is not: -0.0 + 0 is 0.0)."""
    if len(args) == 2 and args[1] in ((int, 1), (float, "1.0")) and not kwargs:
        return _same_layout(table, args, kwargs, node)
    return None


def _multiply(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``x * 1`` is x; ``a * b`` is ``b * a``."""
    return _times_one(table, args, kwargs, node) or _commutative(table, args, kwargs, node)


def _negate(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``-(-x)`` is x."""
    source = args[0]
    if isinstance(source, Term) and source.op[0] is table.op(aten.neg.default):
        inner = source.op[1]
        if isinstance(inner, Term) and table.same_type(inner.value, node.meta.get("val")):
            return inner
    return None


def _filled(value: tuple[type, Any]) -> Rule:
    def rule(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
        """``zeros``, ``ones`` and ``full`` of the same shape, dtype, device and value are one term."""
        made = node.meta.get("val")
        if not isinstance(made, torch.Tensor) or made.layout is not torch.strided or not made.is_contiguous():
            return None
        fill = value if value[0] is not object else args[1] if len(args) > 1 else kwargs.get("fill_value")
        if fill is None or isinstance(fill, Term):
            return None
        return table.intern(("full", table.shape(made), made.dtype, made.device, _as_dtype(fill, made.dtype)), node)

    return rule


def _as_dtype(fill: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The constant as the tensor stores it: a float tensor holds 1.0 whether it was filled with 1, 1.0 or True."""
    if dtype.is_floating_point and fill[0] in (int, bool) and abs(int(fill[1])) <= 256:
        return (float, repr(float(fill[1])))
    return fill


RULES: Mapping[OpOverload, Rule] = MappingProxyType(
    {
        aten.alias.default: _identity,
        aten.detach.default: _identity,
        aten.lift_fresh.default: _identity,
        aten.clone.default: _same_layout,
        aten.contiguous.default: _same_layout,
        aten._to_copy.default: _to_copy,
        aten.expand.default: _same_layout,
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten.reshape.default: _view,
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.t.default: _t,
        aten.add.Tensor: _commutative,
        aten.mul.Tensor: _multiply,
        aten.div.Tensor: _times_one,
        aten.neg.default: _negate,
        aten.bitwise_and.Tensor: _commutative,
        aten.bitwise_or.Tensor: _commutative,
        aten.logical_and.default: _commutative,
        aten.logical_or.default: _commutative,
        aten.eq.Tensor: _commutative,
        aten.ne.Tensor: _commutative,
        aten.zeros.default: _filled((int, 0)),
        aten.ones.default: _filled((int, 1)),
        aten.full.default: _filled((object, None)),
        **COMM_RULES,
    }
)
"""Operator -> rule: the whole algebra of the proof, apart from storage versions and draws (:mod:`dscompile.terms`)."""
