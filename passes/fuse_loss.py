"""Cross-entropy with the projection before it, in chunks: the logits of a whole batch never exist. Reassociates.

In a joint graph the loss's gradient is known to be wanted, so one operator computes loss and gradients chunk by chunk
(:mod:`dscompile.loss_ops`) where PyTorch keeps the log-probabilities of every token from forward to backward. A site is
rewritten if that lowers the bytes held and nothing else reads the logits; each site's decision has its reason.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.graph import Role, StepGraph, annotate
from dscompile.loss_ops import CHUNK_BYTES, MEAN, SUM, loss_dtype
from dscompile.manager import Numerics, PassContext, graph_pass
from dscompile.passes.canonicalise import remove_dead
from dscompile.torch_compat import size_hint
from dscompile.verify import signature

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.detach.default})


@graph_pass("fuse_loss", after={"canonicalise"}, numerics=Numerics.REASSOCIATES, optional=True)
def fuse_loss(graph: StepGraph, ctx: PassContext) -> None:
    """Rewrite ``cross_entropy(x @ weight.T + bias, target)`` and its gradient into ``linear_cross_entropy``."""
    if ctx.config.fused_loss == "off":
        return
    for node in graph.graph.find_nodes(op="call_function", target=aten.nll_loss2d_forward.default):
        ctx.decide(node, "kept", "classes are not the last dimension; flatten logits to [rows, classes]")
    for node in graph.graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default):
        found = match(node)
        if isinstance(found, str):
            ctx.decide(node, "kept", found)
            continue
        before, after = found.bytes_plain(), found.bytes_fused()
        if after >= before and ctx.config.fused_loss == "auto":
            ctx.decide(node, "kept", "fusing holds no less", plain_bytes=before, fused_bytes=after)
        elif graph.edit("fuse", node, why="the logits of a chunk, not of the batch"):
            ctx.decide(node, "fused", "fewer bytes held", plain_bytes=before, fused_bytes=after)
            _rewrite(graph, ctx, found)


@dataclass
class Site:
    """One cross-entropy with its projection. The backward nodes are None in a graph without gradients.

    Attributes:
        project: ``mm`` or ``addmm``: ``[rows, width] @ [width, vocabulary]``.
        loss: ``nll_loss_forward``.
        tangent: the loss's gradient, a scalar.
        gradient: the logits' gradient.
        grad_input, grad_weight, grad_bias: the products (and the sum) that the fused operator replaces.
    """

    project: fx.Node
    loss: fx.Node
    tangent: fx.Node | None = None
    gradient: fx.Node | None = None
    grad_input: fx.Node | None = None
    grad_weight: fx.Node | None = None
    grad_bias: fx.Node | None = None

    @property
    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Input ``[rows, width]``, transposed weight ``[width, vocabulary]``, bias."""
        if self.project.target is aten.mm.default:
            return self.project.args[0], self.project.args[1], None  # type: ignore[return-value]
        return self.project.args[1], self.project.args[2], self.project.args[0]  # type: ignore[return-value]

    def bytes_plain(self) -> int:
        """What PyTorch holds at once: the log-probabilities and, with gradients, the logits' gradient."""
        value = self.project.meta["val"]
        wide = loss_dtype(value.dtype).itemsize
        return _elements(value) * wide * (2 if self.tangent is not None else 1)

    def bytes_fused(self) -> int:
        """A chunk's logits and probabilities; with gradients, those of input and weight."""
        value: torch.Tensor = self.project.meta["val"]
        chunk = 2 * min(CHUNK_BYTES, _elements(value) * loss_dtype(value.dtype).itemsize)
        if self.tangent is None:
            return chunk
        input, weight, _ = self.operands
        return chunk + (_elements(input.meta["val"]) + _elements(weight.meta["val"])) * value.dtype.itemsize


def match(loss: fx.Node) -> Site | str:
    """The projection and the backward of one ``nll_loss_forward``, or why it stays as it is."""
    logp, _, weight, reduction, _ = loss.args
    if weight is not None:
        return "classes are weighted"
    if reduction not in (MEAN, SUM):
        return "a loss for each row is wanted"
    if not isinstance(logp, fx.Node) or logp.target is not aten._log_softmax.default or logp.args[1] not in (1, -1):
        return "its input is no log-softmax over classes"
    project = _through(logp.args[0])
    if project.target is aten.addmm.default:
        if project.kwargs or len(project.args) != 3 or project.args[0].meta["val"].dim() != 1:  # type: ignore[union-attr]
            return "the projection scales its bias"
    elif project.target is not aten.mm.default:
        return "its logits come from no projection"
    if _shape(project) != _shape(logp):
        return "the logits are reordered or cut after the projection"
    if logp.meta["val"].dtype is not loss_dtype(project.meta["val"].dtype):
        return f"the loss is computed in {logp.meta['val'].dtype}"
    site = Site(project, loss)
    readers = _readers(project, _forms(project))
    sizes = {n for n in readers if n.target is aten.sym_size.int}
    if readers - sizes != {logp}:
        return f"the logits are also read by {_names(readers - sizes - {logp})}"
    reason = _match_backward(site, logp)
    if reason:
        return reason
    inner = _forms(site.gradient) if site.gradient is not None else set()
    if any(set(size.users) - inner for size in sizes):
        return "the logits' size is read elsewhere"
    return site


def _match_backward(site: Site, logp: fx.Node) -> str:
    """Find the loss's gradient; returns why it is not one that the fused operator computes, or ""."""
    readers = _readers(logp, _forms(logp))
    backward = [n for n in readers if n.target is aten.nll_loss_backward.default]
    softmax = [n for n in readers if n.target is aten._log_softmax_backward_data.default]
    others = readers - {site.loss, *backward, *softmax}
    if others:
        return f"the log-probabilities are also read by {_names(others)}"
    if not backward and not softmax:
        return ""
    strange = "its gradient is not that of one cross-entropy"
    if len(backward) != 1 or len(softmax) != 1 or softmax[0].args[0] is not backward[0]:
        return strange
    if set(backward[0].users) != {softmax[0]} or backward[0].args[0].meta["val"].dim():  # type: ignore[union-attr]
        return strange
    for part in site.loss.users:
        if part.args[1] == 1 and set(part.users) - {backward[0]}:
            return "the number of counted rows is also read"
    site.tangent, site.gradient = backward[0].args[0], softmax[0]  # type: ignore[assignment]
    return _match_products(site, softmax[0])


def _match_products(site: Site, gradient: fx.Node) -> str:
    """Find the products that read the logits' gradient; returns why the fused operator's are not these, or ""."""
    value, weight_t, bias = site.operands
    inner = _forms(gradient)
    for reader in _readers(gradient, inner):
        if reader.target is aten.t.default and len(reader.users) == 1:
            product = next(iter(reader.users))
            if product.target is aten.mm.default and product.args == (reader, value) and site.grad_weight is None:
                site.grad_weight = product
                continue
        elif reader.target is aten.mm.default and site.grad_input is None:
            if reader.args[0] in {gradient, *inner} and _transposes(reader.args[1], weight_t):
                site.grad_input = reader
                continue
        elif bias is not None and site.grad_bias is None and _sums_rows(reader):
            site.grad_bias = reader
            continue
        return f"the logits' gradient is also read by {_names({reader})}"
    if site.grad_input is None or site.grad_weight is None:
        return "the gradient of the projection's input or weight is not wanted"
    return ""


def _rewrite(graph: StepGraph, ctx: PassContext, site: Site) -> None:
    """Replace the loss and the three gradients, and declare these: all else is proved unchanged."""
    value, weight_t, bias = site.operands
    _, target, _, reduction, ignore_index = site.loss.args
    if weight_t.target is aten.t.default:
        weight = weight_t.args[0]
    else:
        weight = graph.insert_call(site.loss, aten.t.default, (weight_t,), like=site.project)
        annotate(weight, role=Role.VIEW)
    arguments = (value, weight, bias, target, reduction, ignore_index, site.tangent is not None)
    fused = graph.insert_call(site.loss, torch.ops.dscompile.linear_cross_entropy.default, arguments, like=site.project)
    loss, *gradients = (
        graph.insert_call(site.loss, operator.getitem, (fused, part), like=site.project) for part in range(4)
    )
    for part in list(site.loss.users):
        if part.args[1] == 0:
            ctx.replaces(loss, part)
            graph.replace(part, loss)
    for node, gradient in zip((site.grad_input, site.grad_weight, site.grad_bias), gradients, strict=True):
        if node is not None:
            scaled = _scaled(graph, gradient, site.tangent, node)
            ctx.replaces(scaled, node)
            graph.replace(node, scaled)
    remove_dead(graph)


def _scaled(graph: StepGraph, gradient: fx.Node, scale: fx.Node | None, node: fx.Node) -> fx.Node:
    """``gradient * scale`` in the form of ``node``, before it."""
    assert scale is not None
    dtype = gradient.meta["val"].dtype
    if scale.meta["val"].dtype is not dtype:
        scale = graph.insert_call(node, aten._to_copy.default, (scale,), {"dtype": dtype}, like=node)
    scaled = graph.insert_call(node, aten.mul.Tensor, (gradient, scale), like=node)
    if _shape(scaled) != _shape(node):  # the bias's: PyTorch sums over rows and keeps their dimension
        scaled = graph.insert_call(node, aten.unsqueeze.default, (scaled, 0), like=node)
        annotate(scaled, role=Role.VIEW)
    return scaled


# -- following one value -----------------------------------------------------------------------------------------------


def _is_form(node: fx.Node) -> bool:
    """Whether a node only views its operand, or casts it from one floating type to another."""
    if node.target is not aten._to_copy.default:
        return node.target in _VIEWS
    old: torch.Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    new: torch.Tensor = node.meta["val"]
    return old.is_floating_point() and new.is_floating_point() and old.device == new.device and old.layout == new.layout


def _through(node: Any) -> fx.Node:
    while isinstance(node, fx.Node) and _is_form(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _forms(node: fx.Node) -> set[fx.Node]:
    """The views and casts of a value, and theirs."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        fresh = {user for user in stack.pop().users if _is_form(user)} - found
        found |= fresh
        stack.extend(fresh)
    return found


def _readers(node: fx.Node, forms: set[fx.Node]) -> set[fx.Node]:
    return {user for form in (node, *forms) for user in form.users} - forms


def _transposes(node: Any, weight_t: fx.Node) -> bool:
    pairs = ((node, weight_t), (weight_t, node))
    return any([n.target is aten.t.default and n.args[0] is other for n, other in pairs if isinstance(n, fx.Node)])


def _sums_rows(node: fx.Node) -> bool:
    return node.target is aten.sum.dim_IntList and node.args[1] in ([0], (0,))


def _names(nodes: set[fx.Node]) -> str:
    return ", ".join(sorted("the caller" if n.op == "output" else f"%{n.name} ({n.target})" for n in nodes))


def _shape(node: fx.Node) -> Any:
    return signature(node.meta["val"])[1]


def _elements(value: torch.Tensor) -> int:
    return math.prod(size_hint(size) for size in value.shape)
