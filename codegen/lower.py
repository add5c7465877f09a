"""Lower: compile each structurally different region once, through TorchInductor, or say why not.

A region that Inductor cannot compile runs with PyTorch's own kernels. That is counted, named and reported: nothing
falls back silently.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from dscompile.codegen.cpu.choice import choose_attention
from dscompile.codegen.cpu.gemm_choice import choose_gemm
from dscompile.codegen.cpu.norms import choose_norms
from dscompile.codegen.decompositions import decompositions, join_cross_entropy
from dscompile.codegen.emit import emit_aten
from dscompile.codegen.gpu import TritonRegion, choose, on_gpu
from dscompile.codegen.regions import Region, region_module
from dscompile.config import Config
from dscompile.errors import UnsupportedError
from dscompile.inductor_compat import InductorFailure, inductor_compile
from dscompile.program import RegionCode

log = logging.getLogger(__name__)


def lower_regions(regions: Sequence[Region], config: Config) -> dict[str, RegionCode]:
    """Compile the unique regions; returns code by structural key."""
    codes: dict[str, RegionCode] = {}
    for region in regions:
        if not region.inline and region.key not in codes:
            codes[region.key] = lower_region(region, config)
    return codes


def lower_region(region: Region, config: Config) -> RegionCode:
    """Compile one region."""
    module = region_module(region)
    if config.regions == "aten":
        source = emit_aten(module)
        return RegionCode(region.key, "aten", source, reference=source)
    reference = _reference(module)
    attention, fallbacks = choose_attention(module, config)
    why = ""
    if config.kernels == "auto" and on_gpu(region):
        choice = choose(module, region.key)
        why = choice.why
        log.info("GPU region %s: %s, so %s", _where(region), why, "ours" if choice.assembled else "Inductor's")
        if choice.assembled is not None:
            source = choice.assembled.source
            ours = TritonRegion(choice.assembled.kernels)
            return RegionCode(
                *(region.key, "triton", source),
                reference=reference,
                artifact=ours,
                choice=why,
                attention=tuple(attention),
                fallbacks=tuple(fallbacks),
            )
    attention += choose_norms(module, config)
    products = choose_gemm(module, config)
    join_cross_entropy(module)
    try:
        artifact = inductor_compile(
            module, donated=region.donated, fused_rng=config.rng == "fused", decompositions=decompositions()
        )
    except InductorFailure as failure:
        reason = f"{_where(region)}: {failure}"
        log.warning("region runs with aten kernels, Inductor cannot compile it: %s", reason)
        source = reference or emit_aten(region_module(region))  # not what was chosen for Inductor: that has failed
        return RegionCode(region.key, "aten", source, reason, source, passing=failure.passing)
    return RegionCode(
        *(region.key, "inductor", artifact.source_code),
        reference=reference,
        artifact=artifact,
        choice=why,
        attention=tuple(attention),
        products=tuple(products),
        fallbacks=tuple(fallbacks),
    )


def _reference(module: fx.GraphModule) -> str:
    """The region with PyTorch's own kernels, for checking; "" where a higher-order operator has no source."""
    try:
        return emit_aten(module)
    except UnsupportedError:
        return ""


def _where(region: Region) -> str:
    first, last = region.nodes[0], region.nodes[-1]
    return f"{len(region.nodes)} nodes from {_label(first)} to {_label(last)}"


def _label(node: fx.Node) -> str:
    return f"%{node.name} ({node.target})"
