"""Identifies a model for the fingerprint: the contents of its files, and the engine arguments that count."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_tasks.canonical import in_order
from vllm_tasks.engines.local.model_files import PATHS, files_in

FULLY_HASHED = 64 * 2**20
"""Bytes. A file up to this size is hashed completely, a larger one by its size, its head and samples."""
HEAD = 2**20
"""Bytes at the beginning of a file, where weights have the names, types and shapes of their tensors."""
SAMPLES, SAMPLE = 256, 4096
"""The number of samples, spread evenly over the file, and the bytes of each."""
WITHOUT_EFFECT = {
    "how the work is split over devices and machines": """
        tensor_parallel_size pipeline_parallel_size prefill_context_parallel_size
        decode_context_parallel_size data_parallel_size data_parallel_size_local data_parallel_rank
        data_parallel_start_rank data_parallel_address data_parallel_rpc_port data_parallel_backend
        data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb
        dp_sync_interval master_addr master_port disable_nccl_for_dp_synchronization nnodes node_rank
        numa_bind numa_bind_nodes numa_bind_cpus device_ids enable_expert_parallel
        enable_ep_weight_filter enable_eplb eplb_config all2all_backend expert_placement_strategy
        enable_elastic_ep elastic_ep_max_dp_size fully_sharded_loras mm_encoder_tp_mode
        distributed_executor_backend distributed_timeout_seconds cpu_distributed_timeout_seconds
        disable_custom_all_reduce enable_shm_tensor_arena ray_workers_use_nsight enable_dbo ubatch_size
        dbo_decode_token_threshold dbo_prefill_token_threshold enable_fault_tolerance
        fault_tolerance_config enable_nccl_comm_suspend""",
    "how much memory is used, and where": """
        gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override block_size swap_space
        watermark enable_prefix_caching prefix_caching_hash_algo prefix_cache_retention_interval
        prefix_match_unit kv_offloading_size kv_offloading_backend cpu_offload_gb cpu_offload_params
        offload_backend offload_group_size offload_num_in_group offload_prefetch_step offload_params
        enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names
        enable_cumem_allocator max_loras max_cpu_loras mm_processor_cache_gb mm_processor_cache_type
        mm_shm_cache_max_object_size_mb mm_ipc_gpu_memory_gb mm_tensor_ipc skip_mm_profiling""",
    "which rows are processed together, and when": """
        max_num_seqs max_num_active_seqs max_num_batched_tokens max_num_scheduled_tokens
        max_num_queued_reqs max_num_queued_tokens enable_chunked_prefill disable_chunked_mm_input
        long_prefill_token_threshold long_prefill_token_threshold_adaptive prefill_schedule_interval
        scheduler_reserve_full_isl scheduling_policy async_scheduling stream_interval
        disable_hybrid_kv_cache_manager renderer_num_workers shutdown_timeout""",
    "how the same computation is compiled": """
        enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size
        optimization_level performance_mode enable_flashinfer_autotune""",
    "how files are fetched and read": """
        download_dir hf_token max_parallel_loading_workers safetensors_load_strategy use_tqdm_on_load
        safetensors_prefetch_num_threads safetensors_prefetch_block_size""",
    "names, logs and metrics": """
        served_model_name disable_log_stats aggregate_engine_logging enable_log_requests
        disable_log_requests logging_config log_level log_config_file max_log_len profiler_config
        show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces kv_cache_metrics
        kv_cache_metrics_sample kv_events_config custom_histogram_buckets cudagraph_metrics
        per_request_spec_decode_metrics enable_mfu_metrics enable_layerwise_nvtx_tracing
        enable_logging_iteration_details enable_mm_processor_stats jit_monitor_mode jit_monitor_verbose
        fail_on_environ_validation disable_uvicorn_access_log uvicorn_log_level log_error_stack
        enable_log_outputs enable_log_deltas enable_server_load_tracking enable_per_request_metrics
        enable_prompt_tokens_details enable_force_include_usage enable_tokenizer_info_endpoint
        sse_keep_alive_interval fingerprint_mode fingerprint_value""",
}
"""Arguments of vLLM's engine and server by what they change: speed, logs and rounding, but nothing else of an
answer. All others count. vLLM's own hash of its configuration cannot replace this list: it identifies the
compiled graph, so it includes the sizes of buffers and leaves out tokenizers."""
IGNORED = {name for names in WITHOUT_EFFECT.values() for name in names.split()}
WITHOUT_ORDER = {"lora_request", "logit_bias"}
"""Sampling parameters whose pairs may be in any order. That of others is an order of properties, in which
vLLM writes an answer or a template prints the tools."""


def engine_identity(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine arguments that determine an answer. Files count by their contents, not by path."""
    named = {name.replace("-", "_"): value for name, value in arguments.items()}
    return {name: _with_hashes(name, value) for name, value in named.items() if name not in IGNORED}


def sampling_identity(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters; a LoRA adapter counts by its files, not its number."""
    counted = {name: value if name in WITHOUT_ORDER else in_order(value) for name, value in sampling.items()}
    if not (lora := sampling.get("lora_request")):
        return counted
    counts = {name: value for name, value in lora.items() if name not in ("lora_int_id", "load_inplace")}
    return {**counted, "lora_request": _with_hashes("lora_request", counts)}


def _with_hashes(name: str, value: Any) -> Any:
    """Return `value` with the hashes of files in place of paths.

    In arguments other than `PATHS`, a text is a path if it has a slash and names a file.
    """
    if isinstance(value, Mapping):
        return {key: _with_hashes(name if name in PATHS else str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_hashes(name, each) for each in value]
    if isinstance(value, str) and (name in PATHS or os.sep in value):
        if name in PATHS and os.path.isdir(value):
            names = sorted(files_in(value))
            with ThreadPoolExecutor() as reading:  # threads, because most time is spent waiting for the disk
                return dict(
                    zip(names, reading.map(lambda file: hash_of_file(Path(value, file)), names), strict=True)
                )
        if os.path.isfile(value):
            return hash_of_file(Path(value))
    return value


def hash_of_file(path: Path) -> str:
    """Return a hash of a file's contents. It ignores times, which copies keep and downloads change."""
    with path.open("rb") as content:
        size = os.fstat(content.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= FULLY_HASHED:
            digest.update(content.read())
        else:
            digest.update(content.read(HEAD))
            for i in range(SAMPLES):
                content.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()
