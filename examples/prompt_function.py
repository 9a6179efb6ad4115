"""A prompt function with artifacts: few-shot examples in a JSON file, and rules in a text file.

python -m examples.prompt_function
"""

import json
from pathlib import Path
from typing import Any

from examples.which_model import make_model, options
from vllm_tasks import Artifact

SHOTS = [
    {"text": "I want my money back.", "topic": "refund"},
    {"text": "The parcel never came.", "topic": "delivery"},
    {"text": "My password is refused.", "topic": "login"},
]
TEXTS = ["Where is my parcel?", "I cannot log in.", "Please return the 20 euros."]


def with_shots(text: str, artifacts: dict[str, Any], style: str = "plain") -> list[dict[str, str]]:
    """Chat messages: the rules, the examples as earlier turns, and the text."""
    messages = [{"role": "system", "content": f"{artifacts['rules']} Style: {style}."}]
    for shot in artifacts["shots"]:
        messages += [
            {"role": "user", "content": shot["text"]},
            {"role": "assistant", "content": shot["topic"]},
        ]
    return [*messages, {"role": "user", "content": text}]


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.txt").write_text("Name the topic of the message: refund, delivery or login.")
    (folder / "shots.json").write_text(json.dumps(SHOTS))
    model = make_model(
        api_url,
        prompt_func=with_shots,
        artifacts={
            "rules": Artifact(uri=str(folder / "rules.txt")),
            "shots": Artifact(uri=str(folder / "shots.json"), datatype="json"),
        },
        predict_kwargs={
            "temperature": 0,
            "max_tokens": 5,
            "structured_outputs": {"choice": ["refund", "delivery", "login"]},
        },
    )
    # `style` goes to the function; a keyword that it does not name would be a sampling parameter.
    for text, topic in zip(TEXTS, model.predict_batches(TEXTS, style="terse"), strict=True):
        print(f"{topic.strip():10s} {text}")


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
