"""The sampling parameters of vLLM 0.32.0, for machines where vLLM is not installed.

They were read from its source on 2026-11-22.
"""

from __future__ import annotations

from vllm_tasks.rows import Task

TABLE_VERSION = "0.32.0"
SAMPLING_PARAMS = frozenset(
    """
    allowed_token_ids bad_words detokenize extra_args flat_logprobs frequency_penalty ignore_eos
    include_stop_str_in_output logit_bias logprob_token_ids logprobs max_tokens min_p min_tokens n
    output_kind output_text_buffer_length presence_penalty prompt_logprob_start
    prompt_logprob_token_ids prompt_logprobs repetition_detection repetition_penalty
    routed_experts_prompt_start seed skip_clone skip_reading_prefix_cache skip_special_tokens
    spaces_between_special_tokens stop stop_token_ids stream_interval structured_outputs temperature
    thinking_token_budget top_k top_p trace_decode_token_ids watermarking
    """.split()
)
"""`vllm.SamplingParams`."""

COMPLETION_REQUEST = frozenset(
    """
    add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo
    frequency_penalty ignore_eos include_stop_str_in_output kv_transfer_params length_penalty
    logit_bias logprob_token_ids logprobs max_tokens min_p min_tokens mm_payload model n
    presence_penalty priority prompt prompt_embeds prompt_logprobs repetition_detection
    repetition_penalty request_id response_format return_mm_kwargs return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed session_id
    skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval
    stream_options structured_outputs suffix temperature thinking_token_budget top_k top_p
    truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
    """.split()
)
"""`/v1/completions`: the OpenAI fields and vLLM's own."""

CHAT_REQUEST = frozenset(
    """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
    chat_template_kwargs continue_final_message documents ec_transfer_params echo frequency_penalty
    ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params length_penalty
    logit_bias logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages
    min_p min_tokens mm_payload mm_processor_kwargs model n parallel_tool_calls presence_penalty
    priority prompt_logprobs reasoning_effort repetition_detection repetition_penalty request_id
    response_format return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
    return_tokens_as_token_ids routed_experts_prompt_start seed session_id skip_special_tokens
    spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options
    structured_outputs temperature thinking_token_budget tool_choice tools top_k top_logprobs top_p
    truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
    """.split()
)
"""`/v1/chat/completions`: the OpenAI fields and vLLM's own."""

_POOLING = frozenset(
    """
    cache_salt mm_processor_kwargs padding priority truncate_prompt_tokens truncation_side use_activation
    user
    """.split()
)
POOLING_CHAT = frozenset(
    "add_generation_prompt chat_template chat_template_kwargs continue_final_message media_io_kwargs".split()
)
"""Parameters of `/v1/embeddings` and `/classify` that are for chat messages."""
POOLING_REQUEST: dict[Task, frozenset[str]] = {
    "embed": _POOLING | POOLING_CHAT | {"add_special_tokens", "dimensions"},
    "score": _POOLING | {"chat_template_kwargs", "instruction", "max_tokens_per_doc", "max_tokens_per_query"},
    "classify": _POOLING | POOLING_CHAT | {"add_special_tokens"},
    "reward": _POOLING | POOLING_CHAT | {"add_special_tokens"},
}
"""The parameters of the tasks that return numbers, without those that the package sets itself. vLLM composes
these requests of several classes, so that the source of one class does not name them."""
