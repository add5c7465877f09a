"""Keys of whole features: activation checkpointing, sparse attention, and those that are missing here. Data only."""

from __future__ import annotations

from typing import Final

from dscompile.engine.keys import (
    ANY,
    BOOLEAN,
    LIST,
    Key,
    accepted,
    acted,
    choice,
    integer,
    missing_feature,
    refused,
)

_NOT_YET = "not built yet; turn the section off"
_COMPRESSION = "there is no compression yet; turn the section off"
_ELASTIC = "the batch is fixed by the configuration; give two of the three batch sizes"

# fmt: off
FEATURES: Final[tuple[Key, ...]] = (
    refused("activation_checkpointing.partition_activations", BOOLEAN, False, True,
            "there is no model parallelism to partition activations over"),
    refused("activation_checkpointing.cpu_checkpointing", BOOLEAN, False, True,
            "there is no offload of activations yet (taken when training runs on the CPU, where they are in host "
            "memory)"),
    refused("activation_checkpointing.contiguous_memory_optimization", BOOLEAN, False, True,
            "only with partition_activations, which is refused"),
    accepted("activation_checkpointing.number_checkpoints", integer(1), None, 4,
             "read only with contiguous_memory_optimization"),
    accepted("activation_checkpointing.synchronize_checkpoint_boundary", BOOLEAN, False, True,
             "recomputation is part of the compiled graph and has no boundary to wait at"),
    refused("activation_checkpointing.profile", BOOLEAN, False, True, "recomputation is part of the compiled graph; "
            "use "
            "torch.profiler"),
    *missing_feature("flops_profiler", "there is no flops profiler yet; use torch.utils.flop_counter",
                     "profile_step", "module_depth", "top_modules", "detailed", "output_file", "recompute_fwd_factor"),
    *missing_feature("autotuning", "there is no autotuner yet; turn the section off",
                     "results_dir", "exps_dir", "overwrite", "metric", "start_profile_step", "end_profile_step", "fast",
                     "max_train_batch_size", "min_train_batch_size", "max_train_micro_batch_size_per_gpu",
                     "min_train_micro_batch_size_per_gpu", "mp_size", "num_tuning_micro_batch_sizes", "tuner_type",
                     "tuner_early_stopping", "tuner_num_trials", "arg_mappings", "metric_path", "model_info",
                     "model_info_path", "profile_step"),
    *missing_feature("comet", "there is no writer for Comet; use csv_monitor, tensorboard or wandb",
                     "workspace", "project", "samples_log_interval", "experiment_name", "api_key", "experiment_key",
                     "online", "mode"),
    *missing_feature("elasticity", _ELASTIC,
                     "max_train_batch_size", "micro_batch_sizes", "min_gpus", "max_gpus", "min_time", "version",
                     "prefer_larger_batch", "ignore_non_elastic_batch_info", "num_gpus_per_node",
                     "model_parallel_size"),
    *missing_feature("data_efficiency", _NOT_YET, "seed", "data_routing", "data_sampling"),
    *missing_feature("curriculum_learning", _NOT_YET,
                     "curriculum_type", "min_difficulty", "max_difficulty", "schedule_type", "schedule_config"),
    *missing_feature("progressive_layer_drop", _NOT_YET, "theta", "gamma"),
    *missing_feature("eigenvalue", "DeepSpeed itself has disabled it",
                     "verbose", "max_iter", "tol", "stability", "gas_boundary_resolution", "layer_name", "layer_num"),
    *missing_feature("hybrid_engine", "there are no inference kernels to switch to",
                     "max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters",
                     "tp_gather_partition_size", "enable_cuda_graph"),
    *missing_feature("nebula", "a service of Azure; checkpoints are saved asynchronously without it",
                     "persistent_storage_path", "persistent_time_interval", "num_of_version_in_retention",
                     "enable_nebula_load", "load_path"),
    *missing_feature("expert_parallel", "there is no expert parallelism yet",
                     "autoep_size", "expert_tensor_parallel_size", "async_split_plan", "preset_model", "use_grouped_mm",
                     "disable_triton_grouped_mm", "moe_layer_pattern", "router_pattern", "expert_pattern", "score_func",
                     "score_apply", "combine_impl", "comm_backend", "route_norm", "route_scale", "top_k",
                     "routed_scaling_factor", "num_expert_groups", "num_limited_groups", "load_balance_coeff",
                     "expert_w1", "expert_w2", "expert_w3", "num_experts_attr", "top_k_attr", "has_shared_experts",
                     "shared_experts_pattern"),
    *missing_feature("compression_training.layer_reduction", _COMPRESSION,
                     "keep_number_layer", "module_name_prefix", "teacher_layer", "other_module_name"),
    *(
        key
        for method in ("weight_quantization", "activation_quantization", "sparse_pruning", "row_pruning",
                       "head_pruning", "channel_pruning")
        for key in (
            *missing_feature(f"compression_training.{method}.shared_parameters", _COMPRESSION,
                             "schedule_offset", "schedule_offset_end", "schedule_offset_stride", "method",
                             "quantizer_kernel", "quantize_groups", "quantize_verbose", "quantization_type", "rounding",
                             "quantize_weight_in_forward", "fp16_mixed_quantize", "range_calibration", "block_pattern",
                             "dense_ratio", "excluded_modules", "num_heads"),
            refused(f"compression_training.{method}.different_groups", ANY, {}, {"group": {}}, _COMPRESSION),
        )
    ),
    refused("quantize_training", ANY, None, {"enabled": True}, _COMPRESSION),
    refused("weight_quantization", ANY, None, {"quantized_initialization": {}}, "a section of inference"),
    refused("datastates_ckpt", ANY, None, {"host_cache_size": 16}, "checkpoints are saved asynchronously without it"),
    acted("sparse_attention.mode", choice("dense", "fixed", "variable", "bigbird", "bslongformer"), None, "bigbird",
          "the section makes the model's attention block-sparse, by a pass; the layout, `fixed` if it is missing"),
    acted("sparse_attention.block", integer(1), None, 32, "tokens of a block's side (16)"),
    acted("sparse_attention.different_layout_per_head", BOOLEAN, None, True, "a pattern for each head"),
    acted("sparse_attention.num_local_blocks", integer(1), None, 8, "fixed: blocks of a window (4)"),
    acted("sparse_attention.num_global_blocks", integer(0), None, 2, "fixed, bigbird: global blocks (1)"),
    acted("sparse_attention.attention", choice("bidirectional", "unidirectional"), None, "unidirectional",
          "all blocks, or the diagonal and below"),
    acted("sparse_attention.horizontal_global_attention", BOOLEAN, None, True, "global blocks attend to all"),
    acted("sparse_attention.num_different_global_patterns", integer(1), None, 2, "fixed: places of global blocks (1)"),
    acted("sparse_attention.num_random_blocks", integer(0), None, 1, "variable, bigbird: random blocks of a row (0)"),
    acted("sparse_attention.local_window_blocks", LIST, None, [8], "variable: sizes of the windows ([4])"),
    acted("sparse_attention.global_block_indices", LIST, None, [1], "variable, bslongformer: global blocks ([0])"),
    acted("sparse_attention.global_block_end_indices", LIST, None, [2], "variable, bslongformer: ends of global "
          "ranges"),
    acted("sparse_attention.num_sliding_window_blocks", integer(1), None, 5, "bigbird, bslongformer: width (3)"),
)
# fmt: on
