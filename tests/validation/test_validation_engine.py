"""Validation by the real engine: likelihoods from its own log probabilities, and old answers scored again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import eq
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_ARGS
from vllm_tasks import VllmModel
from vllm_tasks.results import Completion
from vllm_tasks.rows import Message
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.report import DatasetReport
from vllm_tasks.validation.run import validate

pytestmark = pytest.mark.engine

QUESTIONS = ["The quick brown fox", "What is the capital of France?", "0 1 2 3 4"]
CHOICES = [" jumps over", " the lazy dog. ", ' {"name": 1}', " 5"]
GO_ON = {"continue_final_message": True, "add_generation_prompt": False}
FIELDS = {
    "identifier": "tiny",
    "vllm_kwargs": TINY_ARGS,
    "predict_kwargs": {"temperature": 0, "max_tokens": 8},
}


def logprobs(model: VllmModel, prompt: str | list[Message], **more: Any) -> list[float]:
    """The engine's log probabilities of a prompt's tokens; the first has none."""
    (answer,) = model.completions([prompt], prompt_logprobs=0, max_tokens=1, temperature=0, **more)
    assert isinstance(answer, Completion)
    return [token.logprob for token in answer.prompt_logprobs or () if token is not None]


def by_hand(model: VllmModel, question: str, text: str) -> tuple[float, int]:
    """The log probability of `text` after `question`, and its tokens."""
    if model.chat:
        asked = [{"role": "user", "content": question}]
        alone = logprobs(model, asked)
        whole = logprobs(model, [*asked, {"role": "assistant", "content": text}], **GO_ON)
    else:
        alone, whole = logprobs(model, question), logprobs(model, question + text)
    own = whole[len(alone) :]
    return math.fsum(own), len(own)


def checked(metrics: Sequence[Metric], **columns: Sequence[Any]) -> Validation:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Validation(
        datasets=[Dataset(identifier="exam", raw_data=rows)], metrics=list(metrics), key=("q", "a")
    )


def found(model: VllmModel, validation: Validation, lake: Path, **options: Any) -> DatasetReport:
    (report,) = validate(model, validation, db=str(lake), **options).datasets
    return report


@pytest.fixture(params=[False, True], ids=["text", "chat"])
def model(local_model: VllmModel, request: pytest.FixtureRequest) -> VllmModel:
    """A model for texts and one for chat messages, on one engine."""
    return VllmModel(**FIELDS, model_name=local_model.model_name, chat=request.param)


def test_perplexity_is_of_the_tokens_of_the_target(model: VllmModel, tmp_path: Path) -> None:
    """exp(-sum / tokens) over the engine's log probabilities of the targets after their prompts."""
    targets = CHOICES[:3]
    parts = [by_hand(model, question, text) for question, text in zip(QUESTIONS, targets, strict=True)]
    expected = math.exp(-sum(p for p, _ in parts) / sum(n for _, n in parts))
    report = found(model, checked([Metric(identifier="perplexity")], q=QUESTIONS, a=targets), tmp_path)
    (value,) = report.values
    assert value.value == pytest.approx(expected, rel=1e-3)
    assert value.low <= value.value <= value.high
    assert (value.n, value.failed, value.higher_is_better) == (3, 0, False)
    assert report.processed == 2 * 3, "each prompt alone and with its target"


@pytest.mark.parametrize("normalize", [None, "characters", "tokens"])
def test_the_choice_is_the_one_that_the_engine_holds_likeliest(
    model: VllmModel, tmp_path: Path, normalize: str | None
) -> None:
    """The choice of multiple_choice follows from the engine's log probabilities."""
    likeliest = []
    for question in QUESTIONS:
        known = [by_hand(model, question, "=" + text) for text in CHOICES]
        size = {"characters": [len(text) + 1 for text in CHOICES], "tokens": [n for _, n in known]}
        per = size.get(str(normalize), [1] * len(CHOICES))
        values = [logprob / n for (logprob, _), n in zip(known, per, strict=True)]
        likeliest.append(values.index(max(values)))
    wrong = [(i + 1) % len(CHOICES) for i in likeliest]
    options = {"choices": "c", "delimiter": "=", **({} if normalize is None else {"normalize": normalize})}
    metric = Metric(identifier="multiple_choice", options=options)
    for name, targets, share in ("right", likeliest, 1.0), ("wrong", wrong, 0.0):
        rows = checked([metric], q=QUESTIONS, a=targets, c=[CHOICES] * 3)
        assert found(model, rows, tmp_path / name).values[0].value == share


def by_transformers(model: VllmModel) -> Callable[[str, str], tuple[float, int]]:
    """The log probability of a text after a context, and its tokens, by lm-evaluation-harness's rule."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.model_name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.model_name, dtype=torch.float32)

    def of(context: str, text: str) -> tuple[float, int]:
        stripped = context.rstrip()
        whole = tokenizer.encode(stripped + context[len(stripped) :] + text)
        start = len(tokenizer.encode(stripped))
        with torch.no_grad():
            known = reference(torch.tensor([whole])).logits.log_softmax(-1)[0]
        own = [known[i - 1, whole[i]].item() for i in range(start, len(whole))]
        return math.fsum(own), len(own)

    return of


@pytest.fixture(scope="module")
def exact_model(tiny_model: Path) -> Iterator[VllmModel]:
    """The tiny model in 32 bits; it has a chat template, and `chat` is not set."""
    with VllmModel(
        identifier="exact",
        model_name=str(tiny_model),
        vllm_kwargs={**TINY_ARGS, "dtype": "float32"},
        predict_kwargs={"temperature": 0, "max_tokens": 1},
    ) as model:
        yield model


@pytest.mark.parametrize(
    ("prompt", "delimiter"),
    [
        ("{input}", " "),
        ("{input} ", ""),
        ("{input}  ", ""),
        ("{input}\n", "\n"),
        ("{input}", ""),
        ("{input} \n", " "),
    ],
)
def test_likelihoods_are_those_of_the_texts_own_tokens(
    exact_model: VllmModel, tmp_path: Path, prompt: str, delimiter: str
) -> None:
    """White space at the end of a prompt belongs to the text, and the figures are those of transformers."""
    model = exact_model.model_copy(update={"prompt": prompt})
    of = by_transformers(model)
    questions, answers = (
        ["What is the capital of", "The quick brown fox", "list of lazy"],
        ["France", "jumps", "dog"],
    )
    choices = [*answers, "Paris, the flag"]
    metrics = [
        Metric(identifier="perplexity", options={"delimiter": delimiter}),
        Metric(identifier="multiple_choice", options={"choices": "c", "delimiter": delimiter}),
    ]
    rows = checked(metrics, q=questions, a=answers, c=[choices] * 3)
    perplexity, choice = found(model, rows, tmp_path).values
    contexts = [prompt.format(input=question) for question in questions]
    parts = [of(context, delimiter + a) for context, a in zip(contexts, answers, strict=True)]
    expected = math.exp(-math.fsum(p for p, _ in parts) / sum(n for _, n in parts))
    assert perplexity.value == pytest.approx(expected, rel=1e-4)
    held = [max(choices, key=lambda c: of(context, delimiter + c)[0]) for context in contexts]
    assert choice.value == sum(map(eq, held, answers)) / 3


def test_old_answers_of_a_local_folder_are_scored_again(local_model: VllmModel, tmp_path: Path) -> None:
    """With `reuse` nothing is sent if model, prompt and sampling are those of the last run, and the values
    are the same; another sampling or delimiter is sent.
    """
    model = VllmModel(**FIELDS, model_name=local_model.model_name)
    names = "token_f1", "output_tokens", "perplexity"
    validation = checked([Metric(identifier=name) for name in names], q=QUESTIONS, a=CHOICES[:3])
    first = found(model, validation, tmp_path, reuse=True)
    assert first.processed == 3 + 6
    assert first.truncated == 3
    again = found(model, validation, tmp_path, reuse=True)
    assert (again.processed, again.values) == (0, first.values)
    assert {(r.run, r.answers) for r in again.history} == {(first.run, first.run), (again.run, first.run)}
    likelihood = validation.model_copy(update={"metrics": validation.metrics[2:]})
    assert found(model, likelihood, tmp_path, reuse=True).processed == 0
    apart = Metric(identifier="perplexity", options={"delimiter": "\n"})
    other = found(model, validation.model_copy(update={"metrics": [apart]}), tmp_path, reuse=True)
    assert (other.processed, other.run == first.run) == (6, False)
    sampling = {"temperature": 0, "max_tokens": 2}
    longer = VllmModel(**{**FIELDS, "predict_kwargs": sampling}, model_name=local_model.model_name)
    assert found(longer, validation, tmp_path, reuse=True).values[1].value == 2.0
    assert found(model, validation, tmp_path).processed == 3 + 6, "without reuse the model is asked anew"
