"""A tiny real Idefics3, the family of SmolVLM: the tiny Llama of `tiny_model`, which also sees.

A picture becomes 4 tokens between two tags. The family is one that vLLM runs without torchvision, which the
environment of the tests leaves out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.tiny_model import make_tiny_model

SIDE = 32
"""Pixels of a side of a picture as the model sees it."""
IMAGE_PROCESSOR = {
    "image_processor_type": "Idefics3ImageProcessor",
    "do_resize": True,
    "size": {"longest_edge": SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_pad": True,
    "do_convert_rgb": True,
    "resample": 1,
}


def make_tiny_vision_model(folder: Path) -> None:
    """Write config, weights, tokenizer and processors into `folder`."""
    import torch
    from transformers import AddedToken, Idefics3Config, Idefics3ForConditionalGeneration
    from transformers import PreTrainedTokenizerFast as Tokenizer

    text = json.loads((make_tiny_model(folder) / "config.json").read_text())
    tokenizer = Tokenizer.from_pretrained(folder)
    tags = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in tags]})
    torch.manual_seed(0)
    config = Idefics3Config(
        text_config={**text, "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    tokenizer.save_pretrained(folder)
    Idefics3ForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    processor = {"processor_class": "Idefics3Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE_PROCESSOR, **processor}))
    (folder / "processor_config.json").write_text(json.dumps({**processor, "image_seq_len": 4}))


if __name__ == "__main__":
    make_tiny_vision_model(Path(sys.argv[1]))
