"""What passes share that let backward compute a saved value again: what it has at hand, and the rewrite itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dscompile.effects import Storages, shared_operand, written
from dscompile.graph import Phase, Role, StepGraph, annotate, info
from dscompile.split import saved_for_backward
from dscompile.torch_compat import tensor_bytes

Again = Callable[[StepGraph, fx.Node, fx.Node, dict[fx.Node, fx.Node]], fx.Node]
"""``(graph, before, node, copies)``: ``node`` a second time in backward, before ``before``, reading ``copies``."""


class Kept:
    """What backward has at hand without the rewrite: graph inputs, and values saved for it."""

    def __init__(self, graph: StepGraph) -> None:
        self.saved = saved_for_backward(graph)[0]
        self._outputs = {base_of(v) for v in graph.output_values() if isinstance(v, fx.Node)}
        self._at_hand = set(self.saved)
        self._storages = Storages(graph)
        self._written = {self._storages.root(n) for node in graph.nodes for n in written(node)}
        # AOTAutograd writes these after forward
        mutated = {o.of for o in graph.outputs if o.kind == "mutation"}
        named = dict(zip(graph.placeholders(), graph.inputs, strict=True))
        self._written |= {self._storages.root(p) for p, i in named.items() if mutated & {i.fqn, *i.aliases}}

    def has(self, node: fx.Node) -> bool:
        """Whether backward has ``node`` or what it views, as forward saw it."""
        node = base_of(node)
        if self._storages.root(node) in self._written:
            return False
        return node.op in ("placeholder", "get_attr") or node in self._at_hand or info(node).role is Role.SYMBOL

    def frees(self, node: fx.Node) -> bool:
        """Whether dropping ``node`` frees its bytes: what the caller receives, or passed in, stays anyway."""
        return node.op == "call_function" and base_of(node) not in self._outputs

    def swap(self, dropped: fx.Node, instead: Sequence[fx.Node]) -> None:
        """From now on ``instead`` is saved, not ``dropped``."""
        self._at_hand -= {dropped}
        self._at_hand |= {base_of(node) for node in instead}


def base_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, or the node itself."""
    while (base := shared_operand(node)) is not None:
        node = base
    return node


def rewrite(graph: StepGraph, value: fx.Node, chain: Sequence[fx.Node], again: Again) -> None:
    """Let every backward node that reads ``value``, or a view of it, read a computation in backward.

    Args:
        graph: edited in place.
        value: computed in forward.
        chain: the nodes to compute, operands first, ``value`` last.
        again: makes one of them.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    forms = _forms(value)
    late = sorted(late_readers(value), key=order.__getitem__)
    copies: dict[fx.Node, fx.Node] = {}
    for node in chain:
        copies[node] = again(graph, late[0], node, copies)
    for form in sorted(forms - {value}, key=order.__getitem__):
        if any(info(user).phase is Phase.BACKWARD for user in _forms_users(form, forms)):
            copies[form] = again(graph, late[0], form, copies)
    for reader in late:
        for operand in reader.all_input_nodes:
            if operand in copies and operand in forms:
                reader.replace_input_with(operand, copies[operand])
                graph.touched.add(reader)
    for form in forms & copies.keys():
        graph.refresh_views(copies[form])


def late_readers(value: fx.Node) -> set[fx.Node]:
    """The backward calls that read ``value`` or a forward view of it."""
    readers = {user for form in _forms(value) for user in form.users}
    return {user for user in readers if info(user).phase is Phase.BACKWARD and user.op == "call_function"}


def call_again(graph: StepGraph, before: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same call a second time."""
    args = fx.map_arg(node.args, lambda n: copies.get(n, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: copies.get(n, n))
    return insert(graph, before, node.target, args, dict(kwargs), node)


def insert(
    graph: StepGraph, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
) -> fx.Node:
    """A call in backward that means what ``like`` does."""
    copy = graph.insert_call(before, target, args, kwargs, like=like)
    annotate(copy, phase=Phase.BACKWARD, role=info(like).role)
    return copy


def _forms(value: fx.Node) -> set[fx.Node]:
    """A value and its forward views, which are not saved but taken again."""
    found, stack = {value}, [value]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user not in found and info(user).phase is Phase.FORWARD and shared_operand(user) is current:
                found.add(user)
                stack.append(user)
    return found


def _forms_users(form: fx.Node, forms: set[fx.Node]) -> list[fx.Node]:
    """The users of a view and of the views of it."""
    found: list[fx.Node] = []
    stack = [form]
    while stack:
        for user in stack.pop().users:
            if user in forms:
                stack.append(user)
            else:
                found.append(user)
    return found


def bytes_of(node: fx.Node) -> int:
    """Bytes of a node's value."""
    return tensor_bytes(node.meta["val"])
