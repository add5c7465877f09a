"""The distributed contestants: one training step of one model over ranks, as a user of each would write it.

Model, initial weights, data, AdamW (fused) and its settings are the same everywhere, so the losses can be compared.
Every rank builds the whole model and then hands it over, which all of these libraries allow.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.variants import Spec
from dscompile.tools.gpt import GPT

LEARNING_RATE = 1e-4
REDUCE_BUCKET = 8_000_000
"""Elements. DeepSpeed's default of 5e8 would set aside a bucket many times the size of these models."""

Step = Callable[[Tensor, Tensor], Tensor]
"""Forward, backward and update on this rank's ``ids`` and ``targets`` (``[batch, context]``); returns the loss."""


@dataclass(frozen=True)
class Variant:
    """One contestant.

    Attributes:
        kind: ``eager``, ``ours``, ``ddp``, ``fsdp2`` or ``deepspeed``: who builds it.
        stage: the ZeRO stage whose state it holds; 0 where everything is replicated.
        compiled: whether a compiler runs in it.
        config: ``zero`` of our configuration, or DeepSpeed's ``zero_optimization``.
    """

    kind: str
    stage: int
    compiled: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


def _ours(stage: int, **zero: Any) -> Variant:
    return Variant("ours", stage, True, {"stage": stage, **zero})


def _deepspeed(stage: int, **zero: Any) -> Variant:
    return Variant("deepspeed", stage, False, {"stage": stage, **zero})


EVERYTHING = 10**12
"""More elements than any of these models has."""

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "eager": Variant("eager", 0),
        "ddp": Variant("ddp", 0),
        "fsdp2": Variant("fsdp2", 3),
        "fsdp2_compile": Variant("fsdp2", 3, True),
        "ds_z1": _deepspeed(1),
        "ds_z2": _deepspeed(2),
        "ds_z3": _deepspeed(3),
        "ds_z3_tight": _deepspeed(3, stage3_max_reuse_distance=0, blocks_live=2),
        "zero0": _ours(0),
        "zero1": _ours(1),
        "zero2": _ours(2),
        "zero3_none": _ours(3, keep_nothing=True),
        "zero3": _ours(3),
        "zero3_all": _ours(3, keep_elements=EVERYTHING),
    }
)
"""``eager`` is one process with the combined batch, the reference of the losses. ``ds_z3`` is DeepSpeed's default,
which keeps small models gathered from forward to backward; ``ds_z3_tight`` keeps two blocks. Ours at stage 3:
``_none`` keeps nothing between forward and backward, the default keeps what the last block of forward reads (the head;
the embedding is not read again by backward) and what is small, ``_all`` keeps everything."""


@dataclass(frozen=True)
class RankSpec(Spec):
    """What a group of ranks measures. ``batch`` is the global batch; ``options`` go to dscompile alone.

    Attributes:
        zero: ``zero`` settings of dscompile's configuration for every variant of ours; a variant's own win.
        ranks: processes.
        warm_up: steps before the timed ones, the first (which compiles) included.
        steps: timed steps.
        private_network: whether ``lo`` carries nothing but these ranks.
    """

    zero: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    warm_up: int = 3
    steps: int = 10
    private_network: bool = False

    @property
    def contestant(self) -> Variant:
        """The entry of :data:`VARIANTS`."""
        return VARIANTS[self.variant]

    @property
    def precision(self) -> str:
        """The process-wide fp32 matmul precision; ``gemm="same"`` gives the peers oneDNN's, as any user can."""
        return "medium" if self.gemm == "same" and self.contestant.kind != "ours" else "highest"

    @property
    def ideal_state(self) -> float:
        """Bytes of fp32 parameters and AdamW's two moments that a rank of this stage must hold between steps.

        Source: Rajbhandari et al., ZeRO (2020), section 5, in fp32, where the parameter is its own master.
        """
        with torch.device("meta"):
            elements = sum(p.numel() for p in GPT(self.config).parameters())
        moments = 8 * elements / (self.ranks if self.contestant.stage >= 1 else 1)
        return moments + 4 * elements / (self.ranks if self.contestant.stage == 3 else 1)


MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ours": ("dscompile.backend", "torch.distributed.tensor"),
        "fsdp2": ("torch.distributed.fsdp",),
        "deepspeed": ("deepspeed",),
    }
)
"""What each kind imports beside PyTorch."""


def load(spec: RankSpec) -> None:
    """Bring in all the code of a variant, its compiler and its optimizer by a step of one line.

    What is resident afterwards counts as imports. Without the step, a variant that imports late would look larger.
    """
    variant = spec.contestant
    for module in MODULES.get(variant.kind, ()):
        importlib.import_module(module)
    run: Callable[[Tensor], Tensor] = _one_line
    if variant.kind == "ours":
        run = torch.compile(_one_line, backend="dscompile", options=spec.options or None)
    elif variant.compiled:
        run = torch.compile(_one_line)
    weight = nn.Parameter(torch.ones(2))
    run(weight).sum().backward()
    torch.optim.AdamW([weight], fused=True).step()


def _one_line(x: Tensor) -> Tensor:
    return x * 2 + 1


def build(spec: RankSpec) -> Step:
    """The training step of this rank. The process group exists already, but for ``eager``."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(spec.precision)
    model = GPT(spec.config)
    variant = spec.contestant
    if variant.kind == "deepspeed":
        return _deepspeed_step(spec, model)
    if variant.kind == "ours":
        return _torch_step(*_ours_model(spec, model))
    if variant.kind == "fsdp2":
        _shard_fsdp2(model, variant.compiled)
    forward = nn.parallel.DistributedDataParallel(model) if variant.kind == "ddp" else model
    return _torch_step(forward, model)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _torch_step(forward: Callable[..., Any], model: nn.Module) -> Step:
    optimizer = _optimizer(model)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = forward(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _ours_model(spec: RankSpec, model: nn.Module) -> tuple[Callable[..., Any], nn.Module]:
    import dscompile
    from dscompile.passes import zero_pipeline

    zero = {**spec.zero, **spec.contestant.config}
    config: dict[str, Any] = {"zero": zero}
    if zero.pop("keep_nothing", False):  # the default pipeline always keeps what the last block reads
        pipeline = zero_pipeline(spec.contestant.stage, dscompile.Config.load(config).zero)
        config["pipeline"] = re.sub(r"selective_unshard(\([^)]*\))?,", "", pipeline)
    sharded = dscompile.distribute(model, config=config)
    return torch.compile(sharded, backend="dscompile", options=spec.options or None), sharded


def _shard_fsdp2(model: GPT, compiled: bool) -> None:
    """One group for each block, and the root for the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block)
    fully_shard(model)


def _deepspeed_step(spec: RankSpec, model: GPT) -> Step:
    import deepspeed

    zero = {"reduce_bucket_size": REDUCE_BUCKET, **spec.contestant.config}
    if blocks := zero.pop("blocks_live", 0):
        block = sum(p.numel() for p in model.blocks[0].parameters())
        zero |= {"stage3_max_live_parameters": blocks * block, "stage3_prefetch_bucket_size": block}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model),
        config={
            "train_micro_batch_size_per_gpu": spec.batch // spec.ranks,
            "gradient_clipping": 0.0,  # the default, 1.0, would change the numbers
            "zero_allow_untested_optimizer": True,  # PyTorch's fused AdamW
            "zero_optimization": zero,
        },
    )

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = engine(ids, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step
