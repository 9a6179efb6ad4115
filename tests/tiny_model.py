"""A tiny real Llama: random weights, a byte-level BPE tokenizer, a chat template.

Two layers of width 128 are real to vLLM in every way that matters to these tests (tokenizer,
KV cache, scheduler, sampling) and start in seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9",
    "What is the capital of France? The capital of France is Paris.",
    '{"name": "value", "list": [1, 2, 3], "flag": true}',
]


def make_tiny_model(folder: Path, *labels: str) -> Path:
    """Write config, weights and tokenizer into `folder` (once) and return it; with `labels` it classifies."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE

    torch.manual_seed(0)
    classes = {"id2label": dict(enumerate(labels))} if labels else {}
    model = (LlamaForSequenceClassification if labels else LlamaForCausalLM)(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=False,
            **classes,
        )
    ).to(torch.bfloat16)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, seed: int, rank: int = 8) -> Path:
    """Write a LoRA adapter for it into `folder`, strong enough to change its answers, and return it."""
    import pytest

    torch = pytest.importorskip("torch")  # which the environment of the engine may have alone
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    weights = {}
    for layer in range(2):
        for part, width in (("q_proj", 128), ("v_proj", 64)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            weights[f"{base}.lora_A.weight"] = torch.randn(rank, 128).to(torch.bfloat16)
            weights[f"{base}.lora_B.weight"] = torch.randn(width, rank).to(torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    make_tiny_model(Path(sys.argv[1]), *sys.argv[2:])
