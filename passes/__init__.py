"""The passes, one family a file, and the pipelines that string them together.

A pipeline is one readable line. Order matters and is checked against each pass's contract when the line is parsed.
"""

from __future__ import annotations

import re

from dscompile.config import Config, ZeroConfig
from dscompile.errors import PipelineError
from dscompile.passes import bucket as _bucket  # noqa: F401  (each registers itself)
from dscompile.passes import canonicalise as _canonicalise  # noqa: F401
from dscompile.passes import fuse_loss as _fuse_loss  # noqa: F401
from dscompile.passes import prefetch as _prefetch  # noqa: F401
from dscompile.passes import recompute as _recompute  # noqa: F401
from dscompile.passes import save_narrow as _save_narrow  # noqa: F401
from dscompile.passes import sparse_attention as _sparse_attention  # noqa: F401
from dscompile.passes import unshard as _unshard  # noqa: F401
from dscompile.passes import zero as _zero  # noqa: F401

PIPELINES: dict[str, str] = {
    "default": "canonicalise,fuse_loss,save_narrow",
    "none": "",
    "zero0": "canonicalise,fuse_loss,save_narrow,merge_ties,zero0,bucket",
    "zero1": "canonicalise,fuse_loss,save_narrow,merge_ties,zero1,bucket,prefetch",
    "zero2": "canonicalise,fuse_loss,save_narrow,merge_ties,zero2,bucket,prefetch",
    "zero3": "canonicalise,fuse_loss,save_narrow,merge_ties,zero3,selective_unshard,bucket,prefetch",
}
"""Named pipelines. ``default`` is what ``torch.compile(model, backend="dscompile")`` runs on an unsharded model; on a
sharded one it is the pipeline of the ZeRO stage, with the sizes of the ``zero`` configuration."""


def zero_pipeline(stage: int, zero: ZeroConfig) -> str:
    """The default pipeline of a ZeRO stage with the configured sizes (elements, as DeepSpeed's keys)."""
    options = {
        "bucket": f"(gather={zero.allgather_bucket_size}, reduce={zero.reduce_bucket_size})",
        "selective_unshard": f"(threshold={zero.stage3_param_persistence_threshold}, budget={zero.keep_elements})",
        "prefetch": f"(elements={zero.stage3_prefetch_bucket_size if zero.overlap_comm else 0})",
    }
    return ",".join(name + options.get(name, "") for name in PIPELINES[f"zero{stage}"].split(","))


def with_sparse_attention(pipeline: str, config: Config) -> str:
    """``pipeline`` with the pass that the ``sparse_attention`` section asks for, right after ``canonicalise``.

    Raises:
        PipelineError: a pipeline that the user spelt out lacks the pass: where it belongs is for them to say.
    """
    text = PIPELINES.get(pipeline, pipeline)
    if config.sparse_attention is None or re.search(r"\bsparse_attention\b", text):
        return text
    if config.pipeline not in PIPELINES:
        raise PipelineError(
            f"pipeline: {text!r} lacks 'sparse_attention', which the option 'sparse_attention' asks for. "
            "Add the pass after 'canonicalise', or use a named pipeline."
        )
    first, _, rest = text.partition(",")
    return ",".join(filter(None, (first, "sparse_attention", rest)))


def with_recompute(pipeline: str, config: Config) -> str:
    """``pipeline`` with the pass that the ``recompute`` section asks for, right after ``fuse_loss``.

    Raises:
        PipelineError: a pipeline without ``fuse_loss`` lacks the pass: where it belongs is for the user to say.
    """
    text = PIPELINES.get(pipeline, pipeline)
    if config.recompute is None or re.search(r"\brecompute\b", text):
        return text
    if config.pipeline not in PIPELINES or "fuse_loss" not in text:
        raise PipelineError(
            f"pipeline: {text!r} lacks 'recompute', which the option 'recompute' asks for. "
            "Add the pass before those that plan communication, or use a named pipeline."
        )
    return text.replace("fuse_loss", "fuse_loss,recompute", 1)
