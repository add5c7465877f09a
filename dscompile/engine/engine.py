"""The engine: a model, its optimizer and its schedule, trained as a DeepSpeed configuration says.

::

    engine, optimizer, loader, schedule = dscompile.initialize(model=model, config="ds_config.json")
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

The model is distributed (:func:`dscompile.distribute`) and compiled; the engine adds what happens around the compiled
graphs: accumulation, loss scaling, clipping, the schedule, counting. PyTorch's own loop (``loss.backward();
optimizer.step()``) works too, since all of it hangs on the optimizer's hooks (:mod:`dscompile.engine.finish`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dscompile.accumulate as accumulation
from dscompile.engine.data import Loader
from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.finish import Finisher
from dscompile.engine.gc_freeze import GcFreeze
from dscompile.engine.host_adam import HostStep, keep_reduced_gradients
from dscompile.engine.one_program import OneProgram
from dscompile.engine.outputs import tensors_in
from dscompile.engine.progress import Progress
from dscompile.engine.saving import Position, load, save, save_half
from dscompile.engine.whole_steps import WholeSteps
from dscompile.engine.window import Window
from dscompile.errors import ConfigError, RunError
from dscompile.precision import LossScaler
from dscompile.torch_compat import has_call_hooks

_LOG = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """What :func:`dscompile.engine.initialize.initialize` made for an engine."""

    model: nn.Module
    config: EngineConfig
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    loader: Loader | None
    device: torch.device
    rank: int
    world: int


def _options(config: EngineConfig) -> dict[str, Any]:
    """The compiler's options for graphs without parameters; those with some know them from ``distribute``."""
    compiler = config.compiler
    return {name: getattr(compiler, name) for name in compiler.model_fields_set - {"zero", "precision"}}


class Engine(WholeSteps):
    """A model under training. Make it with :func:`dscompile.initialize`; attributes it lacks are the model's.

    Attributes:
        module: the model, its parameters sharded by the ZeRO stage.
        optimizer: a ``torch.optim`` optimizer of the sharded parameters, or None.
        lr_scheduler: the schedule, moved on by :meth:`step` after each step that was not skipped, or None.
        training_dataloader: of ``training_data``, or None.
        scaler: the loss scaler of fp16, or None.
        one_program: how :meth:`train_batch` runs its micro-batches; its ``reason`` says why as frames, if so.
        micro_steps: calls of :meth:`step`.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.model
        self.settings, self.device = parts.config, parts.device
        self.global_rank, self.world_size = parts.rank, parts.world
        self.batch = parts.config.batch
        self.optimizer, self.lr_scheduler, self.training_dataloader = parts.optimizer, parts.scheduler, parts.loader
        self.micro_steps = 0
        stage, options = parts.config.compiler.zero.stage, parts.config.loss_scaling
        self.scaler = LossScaler.for_stage(stage, **options) if options is not None else None
        self.window = Window(self.batch.accumulation)
        self.finisher = (
            Finisher(self.module, self.optimizer, parts.config, self.scaler, self.window, parts.world)
            if self.optimizer is not None
            else None
        )
        self.progress = Progress(parts.config, parts.rank, parts.world, self.device)
        # In a tuple: the compiled model is a module around the same model, and must not be registered a second time.
        self._compiled: tuple[Callable[..., Any]] = (
            torch.compile(self.module, backend="dscompile", options=_options(parts.config)),
        )
        self.one_program = OneProgram(self.module, parts.config, parts.world, self.device)
        self._gc = GcFreeze(self) if parts.config.freeze_gc else None
        self._inside_no_sync = False
        self._own_backward = False
        self._loss_scaled = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or name.startswith("__"):
                raise
            return getattr(module, name)

    # -- one micro-batch -----------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The compiled model's output. Its gradients will be reduced at the window's last micro-batch only."""
        trains = torch.is_grad_enabled()  # also in eval mode: dropout off, gradients on
        if trains:
            self.window.forward()
            self._loss_scaled = False
        with contextlib.ExitStack() as stack:
            if trains and (self._inside_no_sync or not self.window.at_boundary):
                stack.enter_context(accumulation.no_sync(self.module))
            if self.settings.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=_DTYPES[self.settings.autocast]))
            stack.enter_context(self.progress.timed("forward"))
            outputs = self._compiled[0](*inputs, **kwargs)
        if trains:
            self._watch(outputs)
        return outputs

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Backward of the loss, divided by the accumulation steps and multiplied by the loss scale.

        Args:
            loss: a scalar, not divided yet.
            retain_graph: as in PyTorch.
            scale_wrt_gas: whether to divide by the accumulation steps.

        Returns:
            the loss as it enters the mean: divided, not multiplied by the loss scale.

        Raises:
            RunError: not a scalar, or nothing in it requires a gradient.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise RunError(f"engine.backward(loss): expected a scalar tensor, got {what}; reduce it with .mean().")
        if not loss.requires_grad:
            raise RunError(
                "engine.backward(loss): the loss needs no gradient; was it computed from engine(...) in training mode, "
                "outside torch.no_grad()?"
            )
        share = self.window.size if scale_wrt_gas else 1
        divided = loss / share if share > 1 else loss
        self.progress.loss(loss)
        self._own_backward = True
        try:
            with self.progress.timed("backward"):
                self._scaled(divided).backward(retain_graph=retain_graph)
        finally:
            self._own_backward = False
        self.window.backward(plain=False)
        return divided

    def _as_one_program(self, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor | None:
        hooked = has_call_hooks(self)
        local = self._inside_no_sync or not self.window.at_boundary
        scale = 1.0 if self.scaler is None else self.scaler.scale
        entered = local and not self.one_program.refused
        with accumulation.no_sync(self.module) if entered else contextlib.nullcontext():
            loss = self.one_program.run(loss_fn, batch, hooked=hooked, local=local, scale=scale, share=self.window.size)
        if loss is not None:
            self.window.forward()
            self.progress.loss(loss)
            self.window.backward(plain=False)
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for ``engine.scale(loss).backward()``."""
        self._loss_scaled = True
        return self._scaled(loss)

    def _scaled(self, loss: Tensor) -> Tensor:
        # In fp32: a half-precision loss times 65536 would be infinite.
        return loss if self.scaler is None else loss.float() * self.scaler.scale

    def _watch(self, outputs: Any) -> None:
        """Take note of a backward pass that the script runs itself; its gradients are divided at the step."""
        tensors = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
        if not tensors and self.module.training:
            kind = type(outputs).__name__
            _LOG.warning("the model returned %s, without a tensor that requires a gradient: use engine.backward", kind)
        for tensor in tensors:
            tensor.register_hook(self._plain_backward)

    def _plain_backward(self, gradient: Tensor) -> None:
        if self._own_backward:
            return
        if self.scaler is not None and not self._loss_scaled:
            raise RunError(
                "loss.backward() without the loss scale, which fp16 needs: call engine.backward(loss), or "
                "engine.scale(loss).backward()."
            )
        self.window.backward(plain=True)

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-batch; at the window's last one, update the parameters, the schedule and the counts.

        Raises:
            RunError: without an optimizer, or inside :meth:`no_sync`.
        """
        optimizer, finisher = self.optimizer, self.finisher
        if optimizer is None or finisher is None:
            raise RunError("engine.step() without an optimizer: pass one to initialize(), or name one in the config.")
        if self._inside_no_sync:
            raise RunError("engine.step() inside engine.no_sync(): its gradients were not reduced; step outside.")
        if self.window.step_is_due:
            with self.progress.timed("step"):
                accumulation.reduce_pending(self.module)
                finisher.by_engine = True
                try:
                    optimizer.step()
                finally:
                    finisher.by_engine = False
                optimizer.zero_grad(set_to_none=True)
                if self.lr_scheduler is not None and finisher.applied:
                    self.lr_scheduler.step(**(lr_kwargs or {}))
            self.window.reset()
            self.progress.step(self)
        else:
            self.window.step()
        self.micro_steps += 1

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forward passes inside add up gradients on each rank; the first one outside reduces all of them.

        Raises:
            RunError: entered inside itself.
        """
        if self._inside_no_sync:
            raise RunError("engine.no_sync() is open already; it does not nest.")
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last of its window: :meth:`step` will update the parameters."""
        return self.window.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say so by hand, before the micro-batch's forward pass; from then on the engine does not count."""
        self.window.force(is_boundary)

    # -- keeping it ----------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        asynchronous: bool = False,
    ) -> bool:
        """Save everything under ``save_dir/tag`` (by default ``global_stepN``). Call it on every rank, between steps.

        ``asynchronous`` writes in the background (:func:`dscompile.engine.checkpoint.save_checkpoint`).

        Raises:
            ConfigError: ``save_latest=False`` or ``exclude_frozen_parameters=True``, which do not exist here.
            RunError: in the middle of an accumulation window, whose gradients would be lost.
            CheckpointError: it cannot be written; what was there is intact.
        """
        if not save_latest or exclude_frozen_parameters:
            which = "save_latest=False" if not save_latest else "exclude_frozen_parameters=True"
            raise ConfigError(f"save_checkpoint({which}) is not supported: a checkpoint is complete, and `latest`.")
        if self.window.open:
            raise RunError(
                f"save_checkpoint() after {self.window.done} of {self.window.size} micro-batches: their gradients "
                "would be lost; save after engine.step() has updated the parameters."
            )
        name = tag if tag is not None else f"global_step{self.global_steps}"
        save(self, save_dir, str(name), client_state or {}, asynchronous=asynchronous)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load a checkpoint, saved at any number of ranks and any stage. Call it on every rank.

        Returns:
            its path and the ``client_state`` it was saved with; (None, {}) and a warning if no ``tag`` is given and
            the directory has no checkpoint, as in DeepSpeed.

        Raises:
            CheckpointError: damaged, of another model, or no such tag; nothing was changed.
        """
        parts = not load_module_only
        return load(
            self,
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer=parts and load_optimizer_states,
            scheduler=parts and load_lr_scheduler_states,
            position=parts,
        )

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> bool:
        """Write the whole model, in the dtype it computes in, to one file of ``torch.save``; rank 0 writes.

        Returns:
            False, and a warning, if the model is sharded (stage 3) and the configuration does not allow to gather it.
        """
        return save_half(self, Path(save_dir) / save_filename)

    save_fp16_model = save_16bit_model

    def position(self) -> Position:
        """The counts that a checkpoint keeps."""
        return Position(self.global_steps, self.skipped_steps, self.micro_steps)

    def move_to(self, position: Position) -> None:
        """Set the counts, from a checkpoint."""
        self.micro_steps = position.micro_steps
        if self.finisher is not None:
            self.finisher.steps, self.finisher.skipped = position.global_steps, position.skipped_steps
        self.window.reset()

    # -- changing it ---------------------------------------------------------------------------------------------------

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per step by the number of accumulation steps.

        Raises:
            ConfigError: no multiple of micro-batch times ranks.
            RunError: in the middle of a window.
        """
        unit = self.batch.micro * self.world_size
        if train_batch_size < unit or train_batch_size % unit:
            raise ConfigError(
                f"train_batch_size = {train_batch_size}: must be a multiple of micro-batch * ranks = {unit}."
            )
        self.window.resize(train_batch_size // unit)
        self.batch = type(self.batch)(train_batch_size, self.batch.micro, train_batch_size // unit)
        if isinstance(self.optimizer, HostStep):
            keep_reduced_gradients(self.optimizer, self.batch.accumulation)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; inside a window also those accumulated without reduction."""
        self.module.zero_grad(set_to_none=set_to_none)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Has no effect: the model is compiled already, by the backend ``dscompile``."""
        _LOG.info("engine.compile(): the model is compiled already, by the backend 'dscompile'")

    def log_summary(self) -> str:
        """The table of collectives so far, which is also logged on rank 0.

        Raises:
            RunError: ``comms_logger`` is not enabled.
        """
        if self.progress.comm_log is None:
            raise RunError("engine.log_summary(): nothing was logged; set comms_logger.enabled in the configuration.")
        return self.progress.comm_log.log_summary()

    def collect_python_gc(self) -> int:
        """Collect cyclic garbage now; for ``disable_python_gc``."""
        return GcFreeze.collect()

    def destroy(self) -> None:
        """Let go of the optimizer and the process: hooks, files of monitors, garbage collection."""
        if self.finisher is not None:
            self.finisher.remove()
        if self._gc is not None:
            self._gc.restore()
        self.progress.close()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's, under the model's own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, under the model's own names."""
        return self.module.load_state_dict(*args, **kwargs)
