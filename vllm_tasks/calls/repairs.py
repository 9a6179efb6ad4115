"""Further attempts at a row whose answer is not accepted: the model is told why (`repair`), or the row is
sampled again (`resample`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_tasks.calls.datatypes import SHOWN, Undecodable
from vllm_tasks.calls.functions import made_of
from vllm_tasks.calls.prompt_func import refusal
from vllm_tasks.errors import InvalidCall, is_of_the_row
from vllm_tasks.rows import Attempted, Choice, Completion, Conversation, Request

TURN = "Your answer {why}. Answer again, with the corrected answer and nothing else."
"""What a model is told about an answer that is not accepted. It counts in the fingerprint with `repair`."""


@dataclass(frozen=True)
class Repairs:
    """What is done about answers that are not accepted."""

    repair: int = 0
    """How often an answer is sent back with the reason."""
    resample: int = 0
    """How often a row is sampled anew."""
    check: Callable[[Any, Any], Any] | None = None
    """Returns why the value of an answer is not accepted, given its record; None if it is."""

    @property
    def most(self) -> int:
        """The largest number of further attempts."""
        return self.repair or self.resample

    def identity(self) -> dict[str, Any]:
        """Return what determines an answer beside its first attempt; empty if nothing does."""
        return {
            **({"repair": self.repair, "turn": TURN} if self.repair else {}),
            **({"resample": self.resample} if self.resample else {}),
            **({"check": made_of(self.check, "check")} if self.check else {}),
        }

    def refuse_useless(self, sampling: Mapping[str, Any]) -> None:
        """Raise `InvalidCall` if a further attempt could only repeat the first one, or is not clear."""
        if self.repair and sampling.get("n") not in (None, 1):
            raise InvalidCall(
                f"repair sends one answer back, and n={sampling['n']!r} makes several: use resample, which "
                "samples all of them anew"
            )
        if self.resample and sampling.get("temperature") == 0:
            raise InvalidCall(
                "resample with temperature=0 would get the same answer again: set a temperature, or use "
                "repair, which tells the model why"
            )

    def checked(self, value: Any, record: Any) -> None:
        """Raise `Undecodable` if the check does not accept the value of a choice."""
        if self.check is None:
            return
        try:
            problem = self.check(value, record)
        except BaseException as error:
            if not is_of_the_row(error):
                raise
            why = f"is refused by the check: {type(error).__name__}: {error}"
            raise Undecodable(why[:SHOWN]) from error
        if problem is not None and not isinstance(problem, str):
            problem = f"it returned a {type(problem).__name__}, not None or a message"
        if problem is not None:
            raise Undecodable(f"is refused by the check: {problem}"[:SHOWN])

    def further(self, request: Request, answer: Attempted, why: str) -> Request:
        """Return the request of the next attempt, after an answer that is not accepted."""
        if self.repair:
            prompt = _with_turn(request.prompt, answer.choices[0], TURN.format(why=why))
            return replace(request, prompt=prompt, earlier=answer)
        if not isinstance(seed := request.sampling.get("seed"), int):
            return replace(request, earlier=answer)
        # With the same seed, the answer would be the same.
        return replace(request, sampling={**request.sampling, "seed": seed + 1}, earlier=answer)


NO_REPAIRS = Repairs()


def attempted(earlier: Completion | None, answer: Completion) -> Attempted:
    """Return an answer with the attempts and the tokens of those before it."""
    before = earlier if isinstance(earlier, Attempted) else Attempted((), 0, 0, attempts=0)
    return Attempted(
        answer.choices,
        _sum(before.prompt_tokens, answer.prompt_tokens),
        _sum(before.completion_tokens, answer.completion_tokens),
        answer.prompt_logprobs,
        answer.model,
        answer.seconds,
        answer.usage,
        before.attempts + 1,
    )


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _with_turn(prompt: Any, answer: Choice, turn: str) -> Any:
    """Return the prompt with an answer and a further turn; a text gets them as text."""
    if isinstance(prompt, str):
        return f"{prompt}{answer.text}\n\n{turn}\n\n"
    said = {"role": "assistant", "content": answer.text}
    messages = [*prompt, said, {"role": "user", "content": turn}]
    if isinstance(prompt, Conversation):
        return Conversation(messages, _with_turn(prompt.text, answer, turn))
    return messages


def check_repairs(repair: int, resample: int, check: Callable[..., Any] | None) -> None:
    """Raise ValueError for repairs that exclude each other, and for a check with other parameters."""
    if repair and resample:
        raise ValueError(
            f"repair={repair} and resample={resample} both say what follows an answer that is not accepted: "
            "use one of them"
        )
    if check is not None and (why := refusal(check, (None, None), {}, twice=())):
        raise ValueError(f"check is called as check(value, row), and this one cannot be: {why}")
