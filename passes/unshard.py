"""Selective unshard: which gathered parameters stay between forward and backward instead of being gathered again.

Keeping a parameter saves one gather and costs its full size from the end of its forward block to the start of its
backward block. Small parameters cost next to nothing; those of the last block of forward are wanted again at once; the
rest are kept while a budget of elements lasts, nearest first, because they are held for the shortest time.
"""

from __future__ import annotations

from dscompile.comm import UNSHARD
from dscompile.graph import GraphKind, Phase, StepGraph, annotate, info
from dscompile.manager import PassContext, graph_pass
from dscompile.passes.markers import Marker, Sections, unshards


@graph_pass("selective_unshard", after={"zero3"}, requires={"regathered"}, optional=True)
def selective_unshard(graph: StepGraph, ctx: PassContext, *, threshold: int = 100_000, budget: int = 0) -> None:
    """Let backward read forward's gather where that is worth its memory.

    Args:
        graph: after ``zero3``.
        ctx: where the reasons go.
        threshold: parameters of fewer elements are kept (DeepSpeed's ``stage3_param_persistence_threshold``).
        budget: elements that may be kept beyond these.
    """
    if graph.kind is not GraphKind.JOINT:
        return
    pairs = _pairs(graph)
    sections = Sections(graph, Phase.FORWARD)
    last = len(sections.spans) - 1
    left = budget
    for forward, backward in reversed(pairs):  # the last gathered is the first wanted again
        elements = forward.elements
        if elements < threshold:
            reason = f"fewer elements than the threshold of {threshold}"
        elif sections.first_use(forward.node) == last:
            reason = "read by the last block of forward and so by the first of backward"
        elif elements <= left:
            reason = f"the budget had {left} elements left"
            left -= elements
        else:
            ctx.decide(backward.node, "gathered again", f"{elements} elements, the budget has {left}", fqn=forward.fqn)
            continue
        if not graph.edit("keep", backward.node, why=reason):
            return
        ctx.decide(forward.node, "kept", reason, elements=elements, fqn=forward.fqn)
        graph.replace(backward.node, forward.node)
        annotate(forward.node, why=f"kept: {reason}")


def _pairs(graph: StepGraph) -> list[tuple[Marker, Marker]]:
    """(forward gather, backward gather) of each parameter that has both, in the order of forward's."""
    forward = {m.node.args: m for m in unshards(graph) if info(m.node).phase is Phase.FORWARD}
    backward = {m.node.args: m for m in unshards(graph) if info(m.node).phase is Phase.BACKWARD}
    return [(m, backward[args]) for args, m in forward.items() if args in backward and m.node.target is UNSHARD]
