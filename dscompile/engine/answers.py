"""What an engine answers when it is asked about itself, under DeepSpeed's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dscompile.engine.processes import local_rank

if TYPE_CHECKING:
    from dscompile.engine.batch import Batch
    from dscompile.engine.ds_config import EngineConfig
    from dscompile.engine.finish import Finisher
    from dscompile.precision import LossScaler


class Answers(nn.Module):
    """Questions to an engine. It changes nothing."""

    settings: EngineConfig
    batch: Batch
    optimizer: torch.optim.Optimizer | None
    finisher: Finisher | None
    scaler: LossScaler | None
    device: torch.device
    world_size: int
    global_rank: int
    micro_steps: int

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was given."""
        return dict(self.settings.given)

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return local_rank()

    @property
    def dp_world_size(self) -> int:
        """Ranks that see different data: all."""
        return self.world_size

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included, as in DeepSpeed."""
        return self.finisher.steps if self.finisher is not None else 0

    @property
    def skipped_steps(self) -> int:
        """Steps that updated nothing because gradients were not finite."""
        return self.finisher.skipped if self.finisher is not None else 0

    @property
    def global_samples(self) -> int:
        """Samples of all steps so far, over ranks."""
        return self.global_steps * self.batch.train

    @property
    def cur_scale(self) -> float:
        """The loss scale now; 1 without one."""
        return self.scaler.scale if self.scaler is not None else 1.0

    @property
    def is_compiled(self) -> bool:
        """True: the engine always compiles."""
        return True

    def train_batch_size(self) -> int:
        """Samples per optimizer step, over ranks."""
        return self.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward pass and rank."""
        return self.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """The three sizes above."""
        return self.batch.train, self.batch.micro, self.batch.accumulation

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """The momentum of each parameter group: ``momentum``, or ``betas``."""
        return [group.get("momentum", group.get("betas")) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer is not None else []

    def get_global_grad_norm(self) -> float | None:
        """The norm of the last step's gradients before clipping, over ranks; None before the first step."""
        report = self.finisher.report if self.finisher is not None else None
        return report.norm if report is not None else None

    def was_step_applied(self) -> bool:
        """Whether the last optimizer step updated the parameters."""
        return self.finisher is not None and self.finisher.steps > 0 and self.finisher.applied

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.settings.compiler.zero.stage

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded (stage 3)."""
        return self.zero_optimization_stage() == 3

    def fp16_enabled(self) -> bool:
        """Whether the model computes in fp16."""
        return self.settings.compiler.precision.param_dtype == "fp16"

    def bfloat16_enabled(self) -> bool:
        """Whether the model computes in bf16."""
        return self.settings.compiler.precision.param_dtype == "bf16"

    def loss_scale(self) -> float:
        """The configured loss scale; 0 if it is dynamic. The present one is :attr:`cur_scale`."""
        return float((self.settings.loss_scaling or {}).get("loss_scale", 0))

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale changes."""
        return self.scaler is not None and self.scaler.dynamic

    def gradient_clipping(self) -> float:
        """The largest gradient norm; 0 for none."""
        return self.settings.gradient_clipping

    def steps_per_print(self) -> int | None:
        """Steps between two progress lines."""
        return self.settings.logging.every

    def wall_clock_breakdown(self) -> bool:
        """Whether the phases of a step are timed."""
        return self.settings.logging.breakdown

    def optimizer_name(self) -> str | None:
        """The optimizer named in the configuration."""
        return self.settings.optimizer.type if self.settings.optimizer is not None else None

    def scheduler_name(self) -> str | None:
        """The schedule named in the configuration."""
        return self.settings.scheduler.type if self.settings.scheduler is not None else None

    def dump_state(self) -> bool:
        """Whether the configuration was logged."""
        return self.settings.logging.state
