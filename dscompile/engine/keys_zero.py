"""Keys of ``zero_optimization`` and of what stands beside it. Data only."""

from __future__ import annotations

import sys
from typing import Final

from dscompile.engine.keys import (
    ANY,
    BOOLEAN,
    DEGREE,
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

_Z = "zero_optimization."
_P = _Z + "offload_param."
_O = _Z + "offload_optimizer."
_BUFFERS = "buckets are laid out by the compiler, whatever it says; the sums are the same"
_OFFLOAD = (
    "there is no offload to host memory or disk yet ('cpu' is taken when training runs on the CPU, where the state "
    "is in "
    "host memory already); remove the section"
)
_OFF = "read only while the section's device is on"
_QUANTISED = "there are no quantised collectives; remove the key"
_MICS = "shards span all data-parallel ranks; remove the key"
_DEVICE = choice("none", "cpu", "nvme")

# fmt: off
ZERO: Final[tuple[Key, ...]] = (
    acted(_Z + "stage", integer(0, 3), 0, 2, "what is sharded over ranks: see docs/zero.md"),
    acted(_Z + "allgather_bucket_size", integer(0), 500_000_000, 1000, "most elements gathered by one collective; "
          "8e6 where the key is not given (5e8 is one bucket for most models)", auto=None),
    acted(_Z + "reduce_bucket_size", integer(0), 500_000_000, 1000, "most elements reduced by one collective; "
          "8e6 where the key is not given", auto=None),
    acted(_Z + "overlap_comm", BOOLEAN, None, False, "launch collectives early and wait late; on unless it is false"),
    acted(_Z + "stage3_prefetch_bucket_size", integer(0), 50_000_000, 1000, "most elements gathered ahead of use",
          auto=None),
    acted(_Z + "stage3_param_persistence_threshold", integer(0), 100_000, 10, "smaller parameters stay gathered "
          "between "
          "forward and backward", auto=None),
    refused(_Z + "stage3_max_live_parameters", integer(0), 1_000_000_000, 1000,
            "how much is gathered at once follows from stage3_prefetch_bucket_size and dscompile.zero.keep_elements"),
    acted(_Z + "ignore_unused_parameters", BOOLEAN, True, False, "false: a step in which a trainable parameter got no "
          "gradient is an error (at every stage)"),
    acted(_Z + "stage3_gather_16bit_weights_on_model_save", BOOLEAN, False, True, "lets save_16bit_model() gather a "
          "sharded model"),
    acted(_Z + "stage3_gather_fp16_weights_on_model_save", BOOLEAN, False, True, "the old name of "
          "stage3_gather_16bit_weights_on_model_save"),
    accepted(_Z + "contiguous_gradients", BOOLEAN, True, False, _BUFFERS),
    accepted(_Z + "reduce_scatter", BOOLEAN, True, False, "sharded gradients are reduce-scattered in any case; the "
             "sums "
             "are the same"),
    accepted(_Z + "use_multi_rank_bucket_allreduce", BOOLEAN, True, False, _BUFFERS),
    accepted(_Z + "allgather_partitions", BOOLEAN, True, False, "parameters are all-gathered in any case; the values "
             "are the same"),
    accepted(_Z + "compute_grad_norm", BOOLEAN, True, False, "the norm comes out of the sweep that checks for "
             "overflow"),
    refused(_Z + "load_from_fp32_weights", BOOLEAN, True, False, "checkpoints hold the fp32 masters only"),
    accepted(_Z + "elastic_checkpoint", BOOLEAN, False, True, "every checkpoint loads at any world size"),
    accepted(_Z + "round_robin_gradients", BOOLEAN, False, True, "orders DeepSpeed's copies to host memory, of which "
             "there are none"),
    accepted(_Z + "parameter_alignment", BOOLEAN, False, True, "each shard is a tensor of its own, aligned by "
             "PyTorch's "
             "allocator"),
    accepted(_Z + "sub_group_size", integer(0), 1_000_000_000, 1000, "the optimizer's step is one pass over all "
             "shards; "
             "the values are the same"),
    refused(_Z + "stage3_model_persistence_threshold", integer(0), sys.maxsize, 1000,
            "what stays gathered is bounded by dscompile.zero.keep_elements"),
    refused(_Z + "stage3_max_reuse_distance", integer(0), 1_000_000_000, 1000,
            "reuse is decided on the graph, by dscompile.zero.keep_elements"),
    accepted(_Z + "stage3_module_granularity_threshold", integer(), 0, 1000, "there are no hooks on modules to group"),
    accepted(_Z + "stage3_use_all_reduce_for_fetch_params", BOOLEAN, False, True, "parameters are all-gathered by the "
             "compiled graph; the values are the same"),
    refused(_Z + "stage3_allgather_sequential", BOOLEAN, False, True, "set allgather_bucket_size to a small number"),
    refused(_Z + "stage3_partition_stream_chunk_size", integer(0), 0, 1000,
            "zero.Init materialises one tensor at a time; there is no smaller unit"),
    refused(_Z + "legacy_stage1", BOOLEAN, False, True, "there is one implementation of stage 1"),
    refused(_Z + "zero_hpz_partition_size", integer(0), 1, 2, "there is no second partition within a node (ZeRO++)"),
    refused(_Z + "zero_quantized_weights", BOOLEAN, False, True, _QUANTISED),
    refused(_Z + "zero_quantized_nontrainable_weights", BOOLEAN, False, True, _QUANTISED),
    refused(_Z + "zero_quantized_gradients", BOOLEAN, False, True, _QUANTISED),
    refused(_Z + "zeropp_loco_param", TABLE, None, {"err_beta": 0.8}, _QUANTISED),
    refused(_Z + "mics_shard_size", integer(), -1, 2, _MICS),
    refused(_Z + "mics_hierarchical_params_gather", BOOLEAN, False, True, _MICS),
    accepted(_Z + "memory_efficient_linear", BOOLEAN, True, False, "replaces nn.Linear's autograd function; the "
             "compiled "
             "graph has none, and saves no gathered weight in either case"),
    refused(_Z + "pipeline_loading_checkpoint", BOOLEAN, False, True, "there are no pipelines yet"),
    accepted(_Z + "override_module_apply", BOOLEAN, True, False, "nn.Module.apply is not replaced; use "
             "zero.GatheredParameters to write"),
    accepted(_Z + "log_trace_cache_warnings", BOOLEAN, False, True, "the order of gathers is compiled, not traced: "
             "there "
             "is no cache to warn of"),
    accepted(_Z + "enable_sanity_checks", BOOLEAN, False, True, "every pass is verified and proved on each compilation "
             "(dscompile.sanitize also runs every kernel beside PyTorch's)"),
    refused(_Z + "save_muon_momentum_buffer_in_memory", BOOLEAN, False, True, "there is no offload and no sharded "
            "Muon"),
    refused(_Z + "leaf_module", TABLE, None, {"classes": ["Block"]},
            "gathers are placed on the graph, not by hooks on modules, so no module needs to be a leaf"),
    refused(_Z + "zenflow", TABLE, None, {"topk_ratio": 0.1}, "ZenFlow needs offload, of which there is none yet"),
    refused(_Z + "cpu_offload", BOOLEAN, None, True, _OFFLOAD),
    refused(_Z + "cpu_offload_param", BOOLEAN, None, True, _OFFLOAD),
    accepted(_Z + "cpu_offload_use_pin_memory", BOOLEAN, None, True, "read only with offload"),
    # offload
    refused(_P + "device", _DEVICE, "none", "nvme", _OFFLOAD),
    refused(_P + "nvme_path", TEXT, None, "/local_nvme", _OFF),
    refused(_P + "buffer_count", integer(0), 5, 6, _OFF),
    refused(_P + "buffer_size", integer(0), 100_000_000, 1000, _OFF),
    refused(_P + "max_in_cpu", integer(0), 1_000_000_000, 1000, _OFF),
    accepted(_P + "pin_memory", BOOLEAN, True, False, _OFF),
    refused(_O + "device", _DEVICE, "none", "nvme", _OFFLOAD),
    refused(_O + "nvme_path", TEXT, None, "/local_nvme", _OFF),
    refused(_O + "buffer_count", integer(0), 4, 5, _OFF),
    accepted(_O + "pin_memory", BOOLEAN, True, False, _OFF),
    refused(_O + "pipeline", BOOLEAN, False, True, _OFF),
    refused(_O + "pipeline_read", BOOLEAN, False, True, _OFF),
    refused(_O + "pipeline_write", BOOLEAN, False, True, _OFF),
    refused(_O + "fast_init", BOOLEAN, False, True, _OFF),
    refused(_O + "ratio", number(0, 1), 1.0, 0.5, _OFF),
    refused(_O + "super_offload", BOOLEAN, False, True, _OFF),
    refused(_O + "convert_grad_on_cpu", BOOLEAN, True, False, _OFF),
    refused(_O + "cpuadam_cores_perc", number(0, 1), 0.8, 0.5, _OFF),
    accepted("aio.block_size", integer(1), 1_048_576, 4096, "file access of offload to disk, which is refused"),
    accepted("aio.queue_depth", integer(1), 8, 16, "file access of offload to disk, which is refused"),
    accepted("aio.thread_count", integer(1), 1, 2, "file access of offload to disk, which is refused"),
    accepted("aio.intra_op_parallelism", integer(1), 1, 2, "file access of offload to disk, which is refused"),
    accepted("aio.single_submit", BOOLEAN, False, True, "file access of offload to disk, which is refused"),
    accepted("aio.overlap_events", BOOLEAN, True, False, "file access of offload to disk, which is refused"),
    accepted("aio.use_gds", BOOLEAN, False, True, "file access of offload to disk, which is refused"),
    # beside the section
    accepted("zero_allow_untested_optimizer", BOOLEAN, False, True, "any elementwise optimizer shards; others are "
             "refused by name when they step"),
    accepted("zero_force_ds_cpu_optimizer", BOOLEAN, True, False, "read only with offload"),
    refused("disable_allgather", BOOLEAN, False, True, "gathers are part of the compiled graph"),
    refused("graph_harvesting", BOOLEAN, False, True, "CUDA graphs are not captured; remove the key"),
    refused("tensor_parallel.autotp_size", DEGREE, 0, 2, "there is no tensor parallelism yet"),
    *(
        refused(f"tensor_parallel.{name}", ANY, None, 1, "read only while autotp_size is above 1, which is refused")
        for name in ("dtype", "preset_model", "tp_overlap_comm", "vocab_parallel_lm_head", "partition_config", "tp",
                     "tensor_parallel", "injection_policy_tuple", "keep_module_on_host", "replace_with_kernel_inject",
                     "kernel_inject")
    ),
    refused("pipeline.stages", ANY, "auto", 2, "there are no pipelines yet"),
    *(
        refused(f"pipeline.{name}", ANY, default, example, "there are no pipelines yet")
        for name, default, example in (("partition", "best", "uniform"), ("seed_layers", False, True),
                                       ("activation_checkpoint_interval", 0, 1), ("pipe_partitioned", True, False),
                                       ("grad_partitioned", True, False), ("use_reentrant", True, False))
    ),
    # DeepCompile
    accepted("compile.deepcompile", BOOLEAN, False, True, "the engine always compiles, by this compiler"),
    refused("compile.passes", LIST, None, ["autosp"], "name passes in dscompile.pipeline"),
    *(
        refused(f"compile.{name}", BOOLEAN, False, True, "there is no offload yet")
        for name in ("offload_activation", "offload_opt_states", "offload_parameters")
    ),
    accepted("compile.offload_activation_pin_memory", BOOLEAN, True, False, "read only with offload"),
    refused("compile.symmetric_memory", BOOLEAN, False, True, "collectives are those of torch.distributed"),
    refused("compile.free_activation", BOOLEAN, False, True, "values are always freed at their last use; remove the "
            "key"),
    accepted("compile.free_activation_threshold", integer(0), 10_485_760, 1000, "read only with free_activation"),
    accepted("compile.double_buffer", BOOLEAN, True, False, "buckets are separate buffers, freed when they are done"),
    refused("compile.debug_log", BOOLEAN, False, True, "set dscompile.dump to a directory"),
    *(
        accepted(f"compile.{name}", BOOLEAN, default, not default, "the program has no side streams to order, and "
                 "needs "
                 "no example inputs to plan")
        for name, default in (("sync_before_reduce", False), ("sync_after_reduce", False),
                              ("sync_before_allgather", False), ("sync_after_allgather", False),
                              ("keep_int_input_tensors", True), ("keep_all_input_tensors", False))
    ),
)
# fmt: on
