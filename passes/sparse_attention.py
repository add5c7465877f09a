"""``sparse_attention``: dense attention of an unchanged model becomes block-sparse, as the configuration asks.

Each ``scaled_dot_product_attention`` of the graph, forward and backward together, becomes the block-sparse operator
with the layout of the ``sparse_attention`` section, made for that attention's heads and length. The model's own causal
and key-padding masks stay: a key is seen if the mask *and* the layout let it.

This changes what the model computes, on purpose, so the pass is declared approximate, and declares each attention that
it replaced: apart from those, all on the same operands, its result is proved equal to the traced graph; later passes
are proved against what it left. Every attention it meets is a decision, with the reason where it is refused.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.attention_ops import BLOCKS
from dscompile.block_layout import BlockLayout
from dscompile.errors import ConfigError, PipelineError
from dscompile.graph import StepGraph, annotate
from dscompile.manager import Numerics, PassContext, graph_pass
from dscompile.params import role_of
from dscompile.passes.attention_scores import hide, is_written_out, operands, spelt_out
from dscompile.passes.attention_sites import RefusedError, Site, is_attention, named, read
from dscompile.passes.attention_sources import CROSS, Sources
from dscompile.passes.canonicalise import remove_dead
from dscompile.section_layout import SECTION_INDEX
from dscompile.sparse_section import SparseAttentionConfig
from dscompile.torch_compat import fake_mode_of, no_modes

aten = torch.ops.aten

_INDEX = ("row_ptr", "col_idx", "t_row_ptr", "t_col_idx")


@dataclass
class Layouts:
    """The layouts of one graph: each is compiled once, and its index is one set of constants."""

    graph: StepGraph
    section: SparseAttentionConfig
    made: dict[tuple[int, int, bool], BlockLayout] = field(default_factory=dict)
    nodes: dict[tuple[BlockLayout, torch.device], tuple[fx.Node, ...]] = field(default_factory=dict)
    visible: dict[tuple[int, int, torch.device], fx.Node] = field(default_factory=dict)
    symbolic: dict[tuple[int, str, bool], tuple[fx.Node, ...]] = field(default_factory=dict)

    def of(self, heads: int, seq: int, *, causal: bool) -> BlockLayout:
        """The layout of an attention; raises :class:`RefusedError` if the sequence is too short for it."""
        key = (heads, seq, causal)
        if key not in self.made:
            with no_modes():  # the compiler runs passes on fake tensors; an index is real
                self.made[key] = BlockLayout.of(self._blocks(heads, seq), self.section.block, causal=causal)
        return self.made[key]

    def _blocks(self, heads: int, seq: int) -> Tensor:
        block = self.section.block
        try:
            return self.section.for_heads(heads).make_layout(-(-seq // block) * block)
        except ConfigError as error:
            raise RefusedError(str(error)) from None

    def mask(self, heads: int, seq: int, device: torch.device) -> fx.Node:
        """The layout token by token, as a constant: bool ``[heads or 1, seq, seq]``, True where a key is visible."""
        key = (heads, seq, device)
        if key not in self.visible:
            with no_modes():
                layout = self._blocks(heads, seq).bool()
                layout = layout[:1] if (layout == layout[:1]).all() else layout
                block = self.section.block
                tokens = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :seq, :seq].contiguous()
            self.visible[key] = self._constant(f"sparse_mask{len(self.visible)}", tokens, device)
        return self.visible[key]

    def constants(self, layout: BlockLayout, device: torch.device) -> tuple[fx.Node, ...]:
        """The index as nodes at the start of the graph."""
        key = (layout, device)
        if key not in self.nodes:
            number = len(self.nodes)
            tensors = {f"sparse_layout{number}_{name}": getattr(layout, name) for name in _INDEX}
            self.nodes[key] = tuple(self._constant(name, value, device) for name, value in tensors.items())
        return self.nodes[key]

    def made_at_run_time(self, site: Site) -> tuple[fx.Node, ...]:
        """The index of an attention whose length is symbolic, as nodes before it; equal ones are made once."""
        key = (site.heads, str(site.seq), site.mask.causal)
        if key not in self.symbolic:
            before = site.forward

            def add(target: Any, *args: Any) -> fx.Node:
                node = self.graph.insert_call(before, target, args, like=before)
                annotate(node, role=role_of(node))
                return node

            section = self.section.model_dump_json()
            made = add(SECTION_INDEX, before.args[0], section, site.mask.causal)
            self.symbolic[key] = tuple(add(operator.getitem, made, number) for number in range(len(_INDEX)))
        return self.symbolic[key]

    def _constant(self, name: str, value: Tensor, device: torch.device) -> fx.Node:
        """A buffer on ``device``; where the machine has no such device the graph is planned, not run, and it stays."""
        graph = self.graph
        with no_modes():
            here = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
            graph.module.register_buffer(name, value.to(device) if here else value, persistent=False)
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        with graph.graph.inserting_before(first):
            node = graph.graph.get_attr(name)
        with fake_mode_of(graph.graph):  # made, not converted: a conversion may give it a symbolic size
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=device)
        annotate(node)
        graph.touched.add(node)
        return node


@graph_pass("sparse_attention", after={"canonicalise"}, numerics=Numerics.APPROXIMATE, optional=True)
def sparse_attention(graph: StepGraph, ctx: PassContext) -> None:
    """Rewrite attention to the block-sparse layout of the configuration's ``sparse_attention`` section."""
    section = ctx.config.sparse_attention
    if section is None:
        raise PipelineError(
            "pipeline: pass 'sparse_attention' needs the option 'sparse_attention', e.g. "
            '{"sparse_attention": {"mode": "bigbird", "block": 64}}.'
        )
    if section.block not in BLOCKS:
        raise ConfigError(f"sparse_attention.block: {section.block} is not one of {', '.join(map(str, BLOCKS))}.")
    layouts, sources = Layouts(graph, section), Sources(graph)
    for node in list(graph.nodes):
        try:
            if is_attention(node):
                _sparse(graph, ctx, read(node, sources), layouts)
            elif is_written_out(node):
                _masked(graph, ctx, node, layouts, sources)
        except RefusedError as error:
            ctx.decide(node, "refused", str(error), fallback=True)
    remove_dead(graph)


def _sparse(graph: StepGraph, ctx: PassContext, site: Site, layouts: Layouts) -> None:
    node, causal = site.forward, site.mask.causal
    facts: dict[str, Any] = {"causal": causal, "padding": len(site.mask.padding)}
    layout: BlockLayout | None = None
    if type(site.seq) is int:
        layout = layouts.of(site.heads, site.seq, causal=causal)
        why = f"{layouts.section.mode} layout, {layout.density:.1%} of {layout.blocks} x {layout.blocks} blocks"
        facts |= {"density": layout.density, "blocks": layout.blocks, "last_block": site.seq % layout.block}
    else:
        why = f"{layouts.section.mode} layout, made for each length when the graph runs"
    if graph.edit("sparse attention", node, why=why):
        device = node.args[0].meta["val"].device  # type: ignore[union-attr]
        index = layouts.made_at_run_time(site) if layout is None else layouts.constants(layout, device)
        _rewrite(graph, ctx, site, layouts.section.block, index)
        ctx.decide(node, "sparse", why, **facts)


def _masked(graph: StepGraph, ctx: PassContext, node: fx.Node, layouts: Layouts, sources: Sources) -> None:
    shape = node.meta["val"].shape
    if len(shape) < 3 or shape[-2] != shape[-1] or node.args[1] not in (-1, len(shape) - 1):
        raise RefusedError(
            f"the softmax of scores {list(shape)}; expected [batch, heads, seq, seq] or [..., seq, seq], last dimension"
        )
    by_head = layouts.section.different_layout_per_head
    if by_head and len(shape) != 4:
        raise RefusedError(
            f"which scores of {list(shape)} are of which head cannot be told, and different_layout_per_head is on; "
            "expected [batch, heads, seq, seq]"
        )
    heads, seq = shape[1] if by_head else 1, shape[-1]
    if type(heads) is not int or type(seq) is not int:
        raise RefusedError(f"heads or length are symbolic ({list(shape)}); compile with dynamic=False")
    made_of = operands(node)
    if made_of is not None and sources.cross(*made_of):
        raise RefusedError(CROSS)
    device = node.meta["val"].device
    layouts.mask(heads, seq, device)
    why = spelt_out(node)
    if graph.edit("mask scores", node, why=why):
        scores = node.args[0]
        ctx.replaces(hide(graph, node, layouts.mask(heads, seq, device)), node, scores)  # type: ignore[arg-type]
        ctx.decide(node, "masked", why, fallback=True)


# -- writing -----------------------------------------------------------------------------------------------------------


def _rewrite(graph: StepGraph, ctx: PassContext, site: Site, block: int, index: tuple[fx.Node, ...]) -> None:
    """Put the block-sparse operator, and its backward, in the place of both halves of a site."""
    operators = torch.ops.dscompile
    rest = (*index, block, site.mask.causal, _padding(graph, site), site.scale)
    given = site.forward.args[:3]
    if site.backward is not None:  # first: afterwards nothing reads what only the dense backward needs
        grad, out, lse = site.backward.args[0], named(site.backward, "out"), named(site.backward, "logsumexp")
        new = graph.insert_call(
            site.backward,
            operators.block_sparse_attention_backward.default,
            (grad, *given, out, lse, *rest),
            like=site.backward,
        )
        alike: tuple[int | None, ...] = (0, 1, 2, 3, 4, 5)
        if site.backward.target is aten._scaled_dot_product_efficient_attention_backward.default:
            # its mask stands between v and the output; one that is given may be gone, and ends what can be compared
            alike = (0, 1, 2, 3) if site.backward.args[4] is not None else (0, 1, 2, 3, None, 4, 5)
        _take_over(graph, ctx, site.backward, new, *alike)
    new = graph.insert_call(site.forward, operators.block_sparse_attention.default, (*given, *rest), like=site.forward)
    _take_over(graph, ctx, site.forward, new, 0, 1, 2)  # q, k, v


def _take_over(graph: StepGraph, ctx: PassContext, old: fx.Node, new: fx.Node, *operands: int | None) -> None:
    """Both operators return their first results in the same order; one of another layout in memory is copied.

    Not the logsumexp: its one reader is the backward, which takes it as it comes.
    """
    results = len(new.meta["val"])
    for result in [n for n in old.users if n.args[1] >= results]:  # type: ignore[operator]
        graph.erase(result)
    before = {result: result.meta["val"] for result in old.users}
    graph.replace(old, new)
    ctx.replaces(new, old, *operands)
    for result, value in before.items():
        result.meta["val"] = new.meta["val"][result.args[1]]
        graph.touched.add(result)
        if result.meta["val"].dim() == 4:
            _settle(graph, ctx, result, value)


def _settle(graph: StepGraph, ctx: PassContext, result: fx.Node, like: Tensor) -> None:
    """Let the readers of ``result`` find it lying in memory as ``like`` does."""
    readers = list(result.users)
    final = result
    if readers and _steps(result.meta["val"]) != _steps(like):
        final = _laid_out(graph, result, like)
        ctx.replaces(final, result, result.args[0])  # type: ignore[arg-type]
        for reader in readers:
            reader.replace_input_with(result, final)
            graph.touched.add(reader)
    graph.refresh_readers(final)  # the stride of a dimension of 1 may still differ, and views show it


def _steps(value: Tensor) -> list[str]:
    """The strides that matter, those of dimensions with more than one element; text, as symbolic ones may be there."""
    return ["" if str(n) == "1" else str(step) for n, step in zip(value.shape, value.stride(), strict=True)]


def _laid_out(graph: StepGraph, result: fx.Node, like: Tensor) -> fx.Node:
    """A copy of ``result`` that lies in memory as ``like`` does; no readers yet."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -strides[d])

    def add(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.insert_call(before, target, args, kwargs, like=result)
        annotate(node, role=role_of(node))
        return node

    moved = add(result.next, aten.permute.default, result, order)
    copy = add(moved.next, aten.clone.default, moved, memory_format=torch.contiguous_format)
    return add(copy.next, aten.permute.default, copy, [order.index(d) for d in range(like.dim())])


def _padding(graph: StepGraph, site: Site) -> fx.Node | None:
    """The key-padding parts of the mask as one bool ``[batch, seq]``, True where a key is hidden."""
    like: fx.Node = site.forward.args[0]  # type: ignore[assignment]
    batch = like.meta["val"].shape[0]
    joined: fx.Node | None = None

    def add(target: Any, *args: Any) -> fx.Node:
        node = graph.insert_call(site.forward, target, args, like=site.forward)
        annotate(node, role=role_of(node))
        return node

    for part in site.mask.padding:
        node = part.node
        while node.meta["val"].dim() > 2:
            node = add(aten.select.int, node, 1, 0)
        if node.meta["val"].dim() == 1:
            node = add(aten.unsqueeze.default, node, 0)
        if part.visible:
            node = add(aten.logical_not.default, node)
        joined = node if joined is None else add(aten.bitwise_or.Tensor, joined, node)
    if joined is not None and str(joined.meta["val"].shape[0]) != str(batch):  # text, as a symbolic size may be
        sizes = [batch if type(batch) is int else add(aten.sym_size.int, like, 0), -1]
        joined = add(aten.expand.default, joined, sizes)
    return joined
