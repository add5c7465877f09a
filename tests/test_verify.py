"""Planted faults: each is a pass that breaks a graph, and the test names the check that must catch it.

Faults run through the manager, as a real pass would; the message must name the rule, the pass, a node, its FQN and the
user's source line. Faults of meaning must also be found by the term proof alone, without the verifier in front of it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx

from dscompile.equivalence import Verdict, prove, snapshot
from dscompile.errors import VerifyError
from dscompile.graph import INFO, InputKind, Phase, Role, StepGraph, annotate
from tests.build import Drops, Hand, Norm, Repeats, Tied, run_pass, trace

aten = torch.ops.aten


def calls(graph: StepGraph, target: object) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is target]


# -- the graphs that are broken ----------------------------------------------------------------------------------------


class Outer(torch.nn.Module):
    """Puts a model one level down, so that everything in it has a module path."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> object:
        return self.model(x)


def drops() -> StepGraph:
    return trace(Outer(Drops()), torch.randn(4, 8))


def norm_with_writes() -> StepGraph:
    return trace(Outer(Norm()), torch.randn(4, 8), keep_mutations=True)


def repeats() -> StepGraph:
    return trace(Outer(Repeats()), torch.randn(4, 8))


def tied() -> StepGraph:
    return trace(Outer(Tied()), torch.randint(0, 16, (2, 3)))


class SavedSine(torch.nn.Module):
    """Uses a buffer and then overwrites it; backward needs only a function of the old value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8))
        self.register_buffer("seen", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(self.seen) * self.weight + x
        self.seen.mul_(2.0)
        return y


def saved_sine() -> StepGraph:
    return trace(Outer(SavedSine()), torch.randn(8), keep_mutations=True)


def in_place() -> StepGraph:
    """Reads a tensor, overwrites it with another value, and reads it again."""
    h = Hand()
    p, x = h.input("p", 4, kind=InputKind.BUFFER), h.input("x", 4)
    before = h.call(aten.sin.default, p)
    copy = h.call(aten.clone.default, p)
    h.call(aten.copy_.default, p, x)
    after = h.call(aten.cos.default, p)
    return h.done([before, after, h.call(aten.neg.default, copy)])


def in_place_through_a_view() -> StepGraph:
    """Writes half of a tensor through a view of it, and reads the whole before and after."""
    h = Hand()
    p, x = h.input("p", 4, kind=InputKind.BUFFER), h.input("x", 2)
    old = h.call(aten.clone.default, p)
    half = h.call(aten.slice.Tensor, p, 0, 0, 2)
    result = h.call(aten.add_.Tensor, half, x)
    after = h.call(aten.cos.default, p)
    return h.done([h.call(aten.neg.default, old), after, h.call(aten.sin.default, result)])


# -- the faults --------------------------------------------------------------------------------------------------------


def fresh_draw(graph: StepGraph) -> None:
    """Backward uses a mask drawn anew instead of forward's."""
    drop, user = calls(graph, aten.native_dropout.default)[0], calls(graph, aten.native_dropout_backward.default)[-1]
    again = graph.insert_call(user, drop.target, drop.args, like=drop)
    mask = graph.insert_call(user, operator.getitem, (again, 1), like=user)
    user.args = (user.args[0], mask, user.args[2])


def swapped_draws(graph: StepGraph) -> None:
    first, second = calls(graph, aten.native_dropout.default)
    chain = [second]  # moves the second draw, with all that it needs, before the first
    for node in chain:
        chain += [n for n in node.all_input_nodes if n.op != "placeholder" and n not in chain]
    for node in reversed(chain):
        first.prepend(node)
    assert first.args[0] is not second.args[0]


def late_draw(graph: StepGraph) -> None:
    """The first dropout's backward gets the mask of the second."""
    users = calls(graph, aten.native_dropout_backward.default)
    users[0].args = (users[0].args[0], users[1].args[1], users[0].args[2])


def draw_removed(graph: StepGraph) -> None:
    drop = calls(graph, aten.native_dropout.default)[0]
    for item in list(drop.users):
        if item.args[1] == 0:
            item.replace_all_uses_with(drop.args[0])
        else:
            with graph.graph.inserting_before(item):
                like = graph.insert_call(
                    item, aten.ones_like.default, (drop.args[0],), {"dtype": torch.bool}, like=drop
                )
                annotate(like, role=Role.COMPUTE)
            item.replace_all_uses_with(like)
        graph.erase(item)
    graph.erase(drop)


def set_outputs(graph: StepGraph, values: list[object]) -> None:
    graph.output_node.args = (tuple(values),)


def output_dropped(graph: StepGraph) -> None:
    set_outputs(graph, graph.output_values()[:-1])


def output_none(graph: StepGraph) -> None:
    values = graph.output_values()
    set_outputs(graph, [*values[:-1], None])


def swapped_gradients(graph: StepGraph) -> None:
    """Two gradients of equal shape change places."""
    values = graph.output_values()
    same = [i for i, v in enumerate(values) if isinstance(v, fx.Node) and v.meta["val"].shape == (8, 8)]
    values[same[0]], values[same[1]] = values[same[1]], values[same[0]]
    set_outputs(graph, values)


def cast_lost(graph: StepGraph) -> None:
    """``x.to(bfloat16).to(float32)`` becomes x: same type, other bits."""
    down = next(n for n in calls(graph, aten._to_copy.default) if n.meta["val"].dtype is torch.bfloat16)
    up = next(iter(down.users))
    graph.replace(up, down.args[0])
    if not down.users:
        graph.erase(down)


def half_cast_lost(graph: StepGraph) -> None:
    """Only the first cast goes, and nobody updates the second's fake value (nor needs to): bits change."""
    down = next(n for n in calls(graph, aten._to_copy.default) if n.meta["val"].dtype is torch.bfloat16)
    graph.replace(down, down.args[0])


def scalar_type(graph: StepGraph) -> None:
    node = next(n for n in calls(graph, aten.mul.Tensor) if n.args[1] == 2.0)
    node.args = (node.args[0], True)


def alpha_added(graph: StepGraph) -> None:
    node = calls(graph, aten.add.Tensor)[0]
    node.kwargs = {"alpha": 2}


def operands_swapped(graph: StepGraph) -> None:
    """``mm(a, b)`` with both operands [8, 8] becomes ``mm(b, a)``."""
    node = calls(graph, aten.mm.default)[0]
    square = graph.insert_call(node, aten.mm.default, (node.args[0], node.args[0].args[0]), like=node)
    assert square.meta["val"].shape[0] == square.meta["val"].shape[1]
    node.replace_all_uses_with(square)


def recompute_after_write(graph: StepGraph) -> None:
    """Backward recomputes ``sin(seen)``, but ``copy_`` (at the end of the joint graph, run in forward) came before."""
    sine = calls(graph, aten.sin.default)[0]
    user = next(n for n in sine.users if n.meta[INFO].phase is Phase.BACKWARD)
    again = graph.insert_call(user, aten.sin.default, sine.args, like=sine)
    annotate(again, phase=Phase.BACKWARD)
    user.replace_input_with(sine, again)


def recompute_after_hoisted_write(graph: StepGraph) -> None:
    """The same with ``copy_`` standing at the boundary of forward and backward."""
    write = calls(graph, aten.copy_.default)[0]
    next(n for n in graph.nodes if n.meta[INFO].phase is Phase.BACKWARD and n.op == "call_function").prepend(write)
    recompute_after_write(graph)


def read_before_write(graph: StepGraph) -> None:
    read, write = calls(graph, aten.cos.default)[0], calls(graph, aten.copy_.default)[0]
    write.prepend(read)


def read_of_old_copy(graph: StepGraph) -> None:
    """The read after the write takes a copy made before it: a stale value, in an order that looks right."""
    read, copy = calls(graph, aten.cos.default)[0], calls(graph, aten.clone.default)[0]
    read.args = (copy,)


def copy_forgotten(graph: StepGraph) -> None:
    """A copy taken before the write is replaced by the tensor itself, read after it."""
    copy = calls(graph, aten.clone.default)[0]
    graph.replace(copy, copy.args[0])


def effects_swapped(graph: StepGraph) -> None:
    first, second = calls(graph, aten.copy_.default)[:2]
    second.append(first)


def effect_removed(graph: StepGraph) -> None:
    graph.erase(calls(graph, aten.copy_.default)[0])


def effect_source_changed(graph: StepGraph) -> None:
    """Two running statistics of one shape are written with each other's values."""
    writes = [w for w in calls(graph, aten.copy_.default) if w.args[0].meta["val"].shape == (8,)]
    first, second = writes[-2:]
    first.args, second.args = (first.args[0], second.args[1]), (second.args[0], first.args[1])


def read_before_write_through_view(graph: StepGraph) -> None:
    """The whole is read before its half is written, although no argument of the read is the written node."""
    read, write = calls(graph, aten.cos.default)[0], calls(graph, aten.add_.Tensor)[0]
    write.prepend(read)


def whole_read_of_old_copy(graph: StepGraph) -> None:
    read, old = calls(graph, aten.cos.default)[0], calls(graph, aten.clone.default)[0]
    read.args = (old,)


def result_read_of_old_copy(graph: StepGraph) -> None:
    """What the in-place operator returned is replaced by a view of the copy made before it."""
    read, old = calls(graph, aten.sin.default)[0], calls(graph, aten.clone.default)[0]
    stale = graph.insert_call(read, aten.slice.Tensor, (old, 0, 0, 2), like=old)
    annotate(stale, role=Role.VIEW)
    read.args = (stale,)


def old_copy_taken_late(graph: StepGraph) -> None:
    """The copy that was to keep the old value is taken after the write."""
    old, write = calls(graph, aten.clone.default)[0], calls(graph, aten.add_.Tensor)[0]
    write.append(old)


def other_half_written(graph: StepGraph) -> None:
    half = calls(graph, aten.slice.Tensor)[0]
    half.args = (half.args[0], 0, 2, 4)


def stale_write(graph: StepGraph) -> None:
    """The write puts the old value back instead of the new one."""
    write, copy = calls(graph, aten.copy_.default)[0], calls(graph, aten.clone.default)[0]
    write.args = (write.args[0], copy)


def write_twice(graph: StepGraph) -> None:
    write = calls(graph, aten.add_.Tensor)[0]
    again = graph.insert_call(next(iter(calls(graph, aten.cos.default))), write.target, write.args, like=write)
    assert again.meta[INFO].role is Role.EFFECT


def draw_with_other_probability(graph: StepGraph) -> None:
    drop = calls(graph, aten.native_dropout.default)[0]
    drop.args = (drop.args[0], 0.25, *drop.args[2:])


def gradient_doubled(graph: StepGraph) -> None:
    """A gradient is accumulated twice."""
    values = graph.output_values()
    i = next(i for i, o in enumerate(graph.outputs) if o.kind == "gradient")
    values[i] = graph.insert_call(graph.output_node, aten.add.Tensor, (values[i], values[i]), like=values[i])
    set_outputs(graph, values)


def gradient_of_another_kind(graph: StepGraph) -> None:
    """The sum over the batch becomes a mean: the classic confusion of reductions."""
    node = next(v for v in graph.output_values() if isinstance(v, fx.Node) and v.target is aten.view.default)
    total = node.args[0]
    assert total.target is aten.sum.dim_IntList
    total.replace_all_uses_with(graph.insert_call(node, aten.mean.dim, total.args, like=total))


def recompute_through_view_after_write(graph: StepGraph) -> None:
    """Backward recomputes from a view of the buffer that forward overwrites in the end."""
    sine = calls(graph, aten.sin.default)[0]
    user = next(n for n in sine.users if n.meta[INFO].phase is Phase.BACKWARD)
    view = graph.insert_call(user, aten.view.default, (sine.args[0], [8]), like=sine)
    annotate(view, phase=Phase.BACKWARD, role=Role.VIEW)
    again = graph.insert_call(user, aten.sin.default, (view,), like=sine)
    annotate(again, phase=Phase.BACKWARD)
    user.replace_input_with(sine, again)


def wrong_clone_dtype(graph: StepGraph) -> None:
    node = calls(graph, aten.clone.default)[0]
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(4, dtype=torch.float16)


def wrong_clone_strides(graph: StepGraph) -> None:
    node = calls(graph, aten.clone.default)[0]
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(8)[::2]


def wrong_view_dtype(graph: StepGraph) -> None:
    node = calls(graph, aten.t.default)[0]
    with node.meta["val"].fake_mode:
        node.meta["val"] = node.meta["val"].to(torch.float16)


def wrong_copy_dtype(graph: StepGraph) -> None:
    """The fake value of a cast says another type than the cast gives."""
    node = calls(graph, aten._to_copy.default)[0]
    with node.meta["val"].fake_mode:
        node.meta["val"] = node.meta["val"].to(torch.float16)


def second_of_equal_calls_wrong(graph: StepGraph) -> None:
    """Two linear layers make equal calls; both are touched, and the second one's fake value is wrong."""
    first, second = calls(graph, aten.addmm.default)
    assert first.meta["val"].shape == second.meta["val"].shape
    graph.touched.update((first, second))
    with second.meta["val"].fake_mode:
        second.meta["val"] = second.meta["val"].to(torch.float16)


def wrong_view_shape(graph: StepGraph) -> None:
    node = next(n for n in calls(graph, aten.view.default) if n.meta["val"].shape == (4, 2, 4))
    node.args = (node.args[0], [4, 4, 2])


def impossible_operands(graph: StepGraph) -> None:
    node = calls(graph, aten.mm.default)[0]
    node.args = (node.args[0], node.args[0])


def use_before_definition(graph: StepGraph) -> None:
    node = next(n for n in graph.nodes if n.op == "call_function" and len(n.users) > 0)
    list(node.users)[-1].append(node)


def foreign_operand(graph: StepGraph) -> None:
    """A node reads one that is in no graph any more."""
    node = calls(graph, aten.mm.default)[0]
    gone = fx.Graph().placeholder("gone")
    gone.meta["val"] = node.meta["val"]
    node.args = (gone, node.args[1])


def forward_reads_backward(graph: StepGraph) -> None:
    tangent = next(n for n in graph.placeholders() if n.name.startswith("tangents"))
    node = calls(graph, aten.add.Tensor)[0]
    node.args = (node.args[0], tangent)


def forward_write_late(graph: StepGraph) -> None:
    """A write of forward is declared backward although forward's program must do it."""
    write = calls(graph, aten.copy_.default)[0]
    tangent = next(n for n in graph.placeholders() if n.name.startswith("tangents"))
    write.args = (write.args[0], graph.insert_call(write, aten.sum.dim_IntList, (tangent, [0]), like=write))
    annotate(write.args[1], phase=Phase.BACKWARD, role=Role.COMPUTE)


def input_renamed(graph: StepGraph) -> None:
    graph.placeholders()[0].name = "other"


def input_table_changed(graph: StepGraph) -> None:
    graph.inputs = (replace(graph.inputs[0], fqn="elsewhere"), *graph.inputs[1:])


def input_type_changed(graph: StepGraph) -> None:
    node = graph.placeholders()[0]
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(3, 5)


def input_fqn_changed(graph: StepGraph) -> None:
    annotate(graph.placeholders()[0], fqn="elsewhere")


def output_strides(graph: StepGraph) -> None:
    """An output comes back transposed in memory."""
    values = graph.output_values()
    last = next(i for i, v in enumerate(values) if isinstance(v, fx.Node) and v.meta["val"].dim() == 2)
    t = graph.insert_call(graph.output_node, aten.t.default, (values[last],), like=values[last])
    c = graph.insert_call(
        graph.output_node, aten.clone.default, (t,), {"memory_format": torch.contiguous_format}, like=t
    )
    values[last] = graph.insert_call(graph.output_node, aten.t.default, (c,), like=c)
    set_outputs(graph, values)


def two_outputs_one_storage(graph: StepGraph) -> None:
    """CSE without care: two results of the user become one tensor."""
    a = graph.output_values()[0]
    view = graph.insert_call(graph.output_node, aten.alias.default, (a,), like=a)
    annotate(view, role=Role.VIEW)
    set_outputs(graph, [a, view, *graph.output_values()[2:]])


def output_is_input(graph: StepGraph) -> None:
    """Clone removal without care: the result is the user's own input."""
    (output,) = graph.output_values()
    graph.replace(output, output.args[0])


def detach_dropped(graph: StepGraph) -> None:
    """Two results in one storage become one Python object."""
    a, b = graph.output_values()
    graph.replace(b, a)


def info_missing(graph: StepGraph) -> None:
    node = calls(graph, aten.mm.default)[0]
    del node.meta[INFO]


def role_wrong(graph: StepGraph) -> None:
    annotate(calls(graph, aten.native_dropout.default)[0], role=Role.COMPUTE)


def clone_output() -> StepGraph:
    h = Hand()
    x = h.input("x", 4)
    return h.done([h.call(aten.clone.default, x)])


def detached_output() -> StepGraph:
    h = Hand()
    y = h.call(aten.sin.default, h.input("x", 4))
    return h.done([y, h.call(aten.detach.default, y)])


def equal_outputs() -> StepGraph:
    h = Hand()
    x = h.input("x", 4)
    return h.done([h.call(aten.sin.default, x), h.call(aten.sin.default, x)])


@dataclass
class Fault:
    """A graph, what is done to it, the check that must catch it, and whether terms alone see it too."""

    make: Callable[[], StepGraph]
    plant: Callable[[StepGraph], None]
    check: str
    terms: bool

    def __str__(self) -> str:
        return self.plant.__name__


FAULTS = [
    Fault(drops, fresh_draw, "random", terms=True),
    Fault(drops, swapped_draws, "random", terms=True),
    Fault(drops, draw_removed, "random", terms=True),
    Fault(drops, late_draw, "equivalence", terms=True),
    Fault(drops, output_dropped, "outputs", terms=True),
    Fault(drops, output_none, "outputs", terms=True),
    Fault(drops, swapped_gradients, "equivalence", terms=True),
    Fault(drops, cast_lost, "equivalence", terms=True),
    Fault(drops, half_cast_lost, "equivalence", terms=True),
    Fault(drops, scalar_type, "equivalence", terms=True),
    Fault(drops, alpha_added, "equivalence", terms=True),
    Fault(saved_sine, recompute_after_write, "equivalence", terms=True),
    Fault(saved_sine, recompute_after_hoisted_write, "equivalence", terms=True),
    Fault(in_place, read_before_write, "effects", terms=True),
    Fault(in_place, read_of_old_copy, "equivalence", terms=True),
    Fault(in_place, copy_forgotten, "equivalence", terms=True),
    Fault(in_place, stale_write, "equivalence", terms=True),
    Fault(in_place_through_a_view, read_before_write_through_view, "effects", terms=True),
    Fault(in_place_through_a_view, whole_read_of_old_copy, "equivalence", terms=True),
    Fault(in_place_through_a_view, result_read_of_old_copy, "equivalence", terms=True),
    Fault(in_place_through_a_view, old_copy_taken_late, "effects", terms=True),
    Fault(in_place_through_a_view, other_half_written, "equivalence", terms=True),
    Fault(in_place_through_a_view, write_twice, "effects", terms=True),
    Fault(saved_sine, recompute_through_view_after_write, "equivalence", terms=True),
    Fault(drops, draw_with_other_probability, "equivalence", terms=True),
    Fault(drops, gradient_doubled, "equivalence", terms=True),
    Fault(drops, gradient_of_another_kind, "equivalence", terms=True),
    Fault(in_place, wrong_clone_dtype, "metadata", terms=False),
    Fault(in_place, wrong_clone_strides, "metadata", terms=False),
    Fault(tied, wrong_view_dtype, "metadata", terms=False),
    Fault(norm_with_writes, effects_swapped, "effects", terms=True),
    Fault(norm_with_writes, effect_removed, "effects", terms=True),
    Fault(norm_with_writes, effect_source_changed, "equivalence", terms=True),
    Fault(norm_with_writes, forward_write_late, "phase", terms=False),
    Fault(norm_with_writes, wrong_view_shape, "metadata", terms=False),
    Fault(drops, wrong_copy_dtype, "metadata", terms=False),
    Fault(drops, second_of_equal_calls_wrong, "metadata", terms=False),
    Fault(tied, impossible_operands, "metadata", terms=False),
    Fault(tied, use_before_definition, "order", terms=False),
    Fault(tied, foreign_operand, "dead", terms=False),
    Fault(drops, forward_reads_backward, "phase", terms=False),
    Fault(drops, input_renamed, "inputs", terms=True),
    Fault(drops, input_table_changed, "inputs", terms=False),
    Fault(drops, input_type_changed, "inputs", terms=False),
    Fault(drops, input_fqn_changed, "info", terms=False),
    Fault(repeats, output_strides, "outputs", terms=False),
    Fault(equal_outputs, two_outputs_one_storage, "output_alias", terms=False),
    Fault(clone_output, output_is_input, "output_alias", terms=False),
    Fault(detached_output, detach_dropped, "output_alias", terms=False),
    Fault(tied, info_missing, "info", terms=False),
    Fault(drops, role_wrong, "info", terms=False),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_fault_is_caught_by_its_check(fault: Fault) -> None:
    with pytest.raises(VerifyError) as caught:
        run_pass(fault.make(), fault.plant)
    message = str(caught.value)
    named = re.findall(r"rule '(\w+)'", message) or [message.split(":")[0]]
    assert fault.check in named, message
    assert "pass 'planted'" in message
    assert re.search(r"%\w+ = ", message), message
    assert re.search(r"\[(model|elsewhere)[\w.]*\]", message), message
    assert re.search(r"/tests/\w+\.py:\d+ in forward", message), message


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.terms], ids=str)
def test_planted_fault_is_seen_by_terms_alone(fault: Fault) -> None:
    graph = fault.make()
    before = snapshot(graph)
    assert prove(before, graph).verdict is Verdict.PROVED
    fault.plant(graph)
    assert prove(before, graph).verdict is Verdict.DIFFERENT
