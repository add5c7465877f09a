"""Keys of batches, optimizers, precision, gradients, logging, data and checkpoints. Data only."""

from __future__ import annotations

from typing import Final

from dscompile.engine.keys import (
    ANY,
    BOOLEAN,
    DTYPE,
    LIST,
    TABLE,
    TEXT,
    Key,
    accepted,
    acted,
    choice,
    integer,
    number,
    refused,
)

_FUSED = "chooses between DeepSpeed's own kernels of one optimizer, which are not used here"
_MONITOR_PATH = "directory of its files"

# fmt: off
TRAINING: Final[tuple[Key, ...]] = (
    # batches
    acted("train_batch_size", integer(1), None, 16, "samples per optimizer step, over all ranks", auto=None),
    acted("train_micro_batch_size_per_gpu", integer(1), None, 4, "samples per forward pass and rank", auto=None),
    acted("gradient_accumulation_steps", integer(1), None, 2, "forward passes per optimizer step", auto=None),
    refused("managed_gradient_accumulation", BOOLEAN, True, False,
            "the engine must know the last micro-batch before its forward pass, which is compiled to reduce; "
            "leave it out, and call engine.set_gradient_accumulation_boundary() to move the boundary"),
    # optimizer and schedule
    acted("optimizer.type", TEXT, None, "SGD", "see the optimizers; `Adam` means AdamW, as in DeepSpeed"),
    acted("optimizer.params", TABLE, None, {"lr": 0.5}, "the optimizer's arguments; an unknown one is an error"),
    accepted("optimizer.legacy_fusion", BOOLEAN, False, True, _FUSED),
    acted("scheduler.type", TEXT, None, "OneCycle", "see the schedules"),
    acted("scheduler.params", TABLE, None, {"warmup_num_steps": 5}, "the schedule's arguments; an unknown one is an "
          "error"),
    # reducing gradients
    acted("communication_data_type", DTYPE, None, "fp32", "dtype in which gradients are reduced; by default that of "
          "the "
          "computation"),
    refused("seq_parallel_comm_data_type", DTYPE, "fp32", "bf16", "there is no sequence parallelism yet"),
    refused("prescale_gradients", BOOLEAN, False, True,
            "the mean over ranks is one operator of the compiled graph with a fixed place for its division; "
            "set communication_data_type to fp32 if half-precision sums overflow"),
    refused("gradient_predivide_factor", number(0), 1.0, 2.0,
            "the mean over ranks is one operator of the compiled graph with a fixed place for its division; "
            "set communication_data_type to fp32 if half-precision sums overflow"),
    acted("gradient_allreduce_op", choice("mean", "sum"), "mean", "sum", "`sum`: gradients are those of the sum of the "
          "ranks' losses (also at stage 3, where DeepSpeed refuses it)"),
    refused("sparse_gradients", BOOLEAN, False, True,
            "gradients are dense in the compiled graph; remove the key (and sparse=True from nn.Embedding)"),
    acted("gradient_clipping", number(0), 1.0, 0.5, "largest global gradient norm; 0 is off. The default is that of "
          "DeepSpeed's code since 2026-06 (before: 0)"),
    # precision
    acted("fp16.enabled", BOOLEAN, False, True, "forward and backward in fp16, fp32 masters, loss scaling"),
    accepted("fp16.auto_cast", BOOLEAN, False, True, "float inputs of the model are always cast to its dtype"),
    acted("fp16.loss_scale", number(0), 0, 128, "a fixed loss scale; 0 is dynamic"),
    acted("fp16.initial_scale_power", integer(0, 64), 16, 8, "the first dynamic scale is 2 to this power"),
    acted("fp16.loss_scale_window", integer(1), 1000, 10, "steps without overflow before the scale doubles"),
    acted("fp16.hysteresis", integer(1), 2, 3, "overflows before the scale falls (ZeRO's rule; stage 0 ignores it, as "
          "in DeepSpeed)"),
    acted("fp16.consecutive_hysteresis", BOOLEAN, False, True, "a step without overflow restores the hysteresis"),
    acted("fp16.min_loss_scale", number(1e-30), 1, 4, "the dynamic scale never falls below it"),
    accepted("fp16.fused_mode", BOOLEAN, True, False, _FUSED),
    refused("fp16.fp16_master_weights_and_grads", BOOLEAN, False, True,
            "masters are fp32; a half-precision master loses small updates. Remove the key"),
    acted("bf16.enabled", BOOLEAN, False, True, "forward and backward in bf16, fp32 masters"),
    acted("bf16.check_grad_overflow", BOOLEAN, True, False, "skip a step whose gradients are not finite"),
    accepted("bf16.immediate_grad_update", BOOLEAN, True, False,
             "gradients reach the fp32 masters in backward, and an optimizer sees them only at the boundary"),
    refused("bf16.bf16_master_weights_and_grads", BOOLEAN, False, True,
            "masters are fp32; a half-precision master loses small updates. Remove the key"),
    refused("bf16.bf16_optimizer_states", BOOLEAN, False, True, "optimizer states are fp32, as the masters are"),
    refused("amp.enabled", BOOLEAN, False, True, "Apex is not maintained; use bf16, fp16 or torch_autocast"),
    refused("amp.opt_level", TEXT, "O1", "O2", "Apex is not maintained; use bf16, fp16 or torch_autocast"),
    acted("torch_autocast.enabled", BOOLEAN, False, True, "torch.autocast around forward; parameters stay fp32"),
    acted("torch_autocast.dtype", DTYPE, "bf16", "fp16", "autocast's dtype; fp16 adds loss scaling with the options of "
          "`fp16`"),
    refused("torch_autocast.lower_precision_safe_modules", LIST, None, ["torch.nn.Linear"],
            "autocast keeps fp32 parameters and gradients, so every module communicates in fp32 "
            "(or in communication_data_type); remove the key"),
    acted("data_types.grad_accum_dtype", DTYPE, None, "fp32", "dtype of the accumulated gradients of the masters"),
    refused("data_types.param_dtype", DTYPE, None, "bf16", "use bf16.enabled or fp16.enabled"),
    acted("data_types.buffer_dtype", DTYPE, None, "bf16", "convert floating-point buffers once; by default they stay"),
    # logging
    acted("steps_per_print", integer(1), None, 10, "log step, skipped steps, learning rates and momenta every so often "
          "(default: DeepSpeed's code; its page says 10)"),
    acted("wall_clock_breakdown", BOOLEAN, False, True, "times of forward, backward and step, with the progress "
          "line and to the "
          "monitors: set steps_per_print too"),
    acted("memory_breakdown", BOOLEAN, False, True, "log the process's peak memory with the progress line"),
    acted("dump_state", BOOLEAN, False, True, "log the whole configuration once"),
    acted("log_level", choice("debug", "info", "warning", "error", "critical"), None, "debug",
          "level of the logger `dscompile`"),
    accepted("vocabulary_size", integer(1), None, 1001, "DeepSpeed only prints a hint about alignment"),
    acted("timers.throughput.enabled", BOOLEAN, True, False, "samples per second in the progress line"),
    accepted("timers.throughput.synchronized", BOOLEAN, True, False, "the step's end waits for the device anyway"),
    acted("disable_python_gc", BOOLEAN, False, True, "automatic garbage collection is off while an engine lives; call "
          "engine.collect_python_gc()"),
    # monitors
    acted("tensorboard.enabled", BOOLEAN, False, True, "loss, learning rate and loss scale by torch's SummaryWriter"),
    acted("tensorboard.output_path", TEXT, None, "logs", _MONITOR_PATH),
    acted("tensorboard.job_name", TEXT, "DeepSpeedJobName", "job", "subdirectory of this job"),
    acted("csv_monitor.enabled", BOOLEAN, False, True, "loss, learning rate and loss scale as CSV files"),
    acted("csv_monitor.output_path", TEXT, None, "logs", _MONITOR_PATH),
    acted("csv_monitor.job_name", TEXT, "DeepSpeedJobName", "job", "subdirectory of this job"),
    acted("wandb.enabled", BOOLEAN, False, True, "loss, learning rate and loss scale by the package wandb"),
    acted("wandb.group", TEXT, None, "group", "the run's group"),
    acted("wandb.team", TEXT, None, "team", "the run's entity"),
    acted("wandb.project", TEXT, "deepspeed", "project", "the run's project"),
    acted("comms_logger.enabled", BOOLEAN, False, True, "log every collective: operator, bytes, latency, bandwidth"),
    acted("comms_logger.verbose", BOOLEAN, False, True, "also log each collective when it has run"),
    acted("comms_logger.prof_all", BOOLEAN, True, False, "all operators, or only those of prof_ops"),
    acted("comms_logger.prof_ops", LIST, [], ["all_gather"], "the operators to log"),
    acted("comms_logger.debug", BOOLEAN, False, True, "one row for each place that a collective is called from"),
    # data and checkpoints
    acted("dataloader_drop_last", BOOLEAN, False, True, "drop an incomplete last batch"),
    acted("checkpoint.tag_validation", choice("ignore", "warn", "fail"), "warn", "fail",
          "what to do when ranks save under different tags (here: ignore compares nothing)"),
    accepted("checkpoint.load_universal", BOOLEAN, False, True, "every checkpoint loads at any world size and stage"),
    refused("checkpoint.use_node_local_storage", BOOLEAN, False, True,
            "a checkpoint is one directory that every rank can reach; use a shared file system"),
    accepted("checkpoint.parallel_write.pipeline_stage", BOOLEAN, False, True, "every rank writes its own part anyway"),
    refused("checkpoint.checkpoint_serialization", BOOLEAN, True, False, "files have one format, without pickle"),
    refused("checkpoint.writer", ANY, None, {"type": "FAST"}, "files are written by torch.distributed.checkpoint"),
    # parallel sizes outside a section
    refused("sequence_parallel_size", integer(1), 1, 2, "there is no sequence parallelism yet"),
    acted("data_parallel_size", integer(1), None, 1, "checked against the number of ranks"),
    refused("use_data_before_expert_parallelism", BOOLEAN, False, True, "there is no expert parallelism yet"),
)
# fmt: on
