"""dscompile: DeepSpeed as a compiler.

``torch.compile(model, backend="dscompile")`` traces one training step to a joint FX graph, runs a verified pipeline of
graph passes over it, and executes the result as a linear program. Nothing is imported here that a user did not ask for:
public names load on first use, so the entry point costs no more than the backend itself.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# A checkout: `passes`, `codegen`, `runtime` and `tools` lie beside this folder, in a wheel they lie in it
# (pyproject.toml). Searching the root as well would also find this folder again, under a second name: None makes that
# import fail.
if not Path(__file__).with_name("passes").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
    sys.modules["dscompile.dscompile"] = None  # type: ignore[assignment]

_PUBLIC = {
    "Config": "config",
    "DscompileError": "errors",
    "StepGraph": "graph",
    "graph_pass": "manager",
    "trace_step": "step",
    "compile_step": "step",
    "last_report": "report",
    "distribute": "distribution",
    "gathered": "reads",
    "access_count": "reads",
    "no_sync": "accumulate",
    "pending_accumulation": "accumulate",
    "reduce_pending": "accumulate",
    "discard_accumulation": "accumulate",
    "check_plain": "accumulate",
    "LossScaler": "precision",
    "finish_gradients": "precision",
    "deferred_init": "deferred",
    "is_deferred": "deferred",
    "materialise": "deferred",
    "initialize": "engine.initialize",
    "Engine": "engine.engine",
    "EngineConfig": "engine.ds_config",
    "init_distributed": "engine.processes",
    "add_config_arguments": "engine.command_line",
    "RepeatingLoader": "engine.data",
    "save_checkpoint": "engine.checkpoint",
    "load_checkpoint": "engine.checkpoint",
    "export_safetensors": "engine.export",
    "load_weights": "engine.export",
    "linear_cross_entropy": "loss_ops",
    "sparse_attention": "block_sparse",
    "SparseSelfAttention": "block_sparse",
    "SparseAttentionUtils": "block_sparse",
    "BlockLayout": "block_layout",
    "evoformer_attention": "evoformer",
    "DS4Sci_EvoformerAttention": "evoformer",
}

_MODULES = {"zero": "engine.zero", "checkpointing": "engine.checkpointing"}
"""DeepSpeed's names that are modules: ``dscompile.zero.Init``, ``dscompile.checkpointing.checkpoint``."""

__all__ = ["__version__", *sorted({**_PUBLIC, **_MODULES})]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"dscompile.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"dscompile.{_MODULES[name]}")
    raise AttributeError(f"module 'dscompile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
