"""What an hour and a million tokens cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.settings import site_settings


@dataclass(frozen=True)
class Prices:
    """Prices, in any currency; a cost is the sum over those that are set.

    An hour counts once, whatever the number of GPUs: four GPUs at 2.50 are 10.0.
    """

    per_hour: float = 0.0
    per_million_prompt_tokens: float = 0.0
    per_million_completion_tokens: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, float] | None) -> Prices:
        """The caller's prices, or the site's when None; raises `InvalidCall`."""
        if given is None:
            site = site_settings()
            return cls(
                site.price_per_hour,
                site.price_per_million_prompt_tokens,
                site.price_per_million_completion_tokens,
            )
        if not isinstance(given, Mapping):
            raise InvalidCall(f"prices={given!r:.100} must be a mapping, such as {{'per_hour': 2.5}}")
        known = [field.name for field in fields(cls)]
        for name, price in given.items():
            if name not in known:
                raise InvalidCall(
                    f"prices has {name!r:.100}{near(str(name), known)}; known are {', '.join(known)}"
                )
            if not _is_price(price):
                raise InvalidCall(f"prices has {name}={price!r:.100}, which is not a number of at least 0")
        return cls(**given)

    @property
    def are_set(self) -> bool:
        """Whether a price is set."""
        return self.per_hour > 0 or self.of_tokens

    @property
    def of_tokens(self) -> bool:
        """Whether tokens have a price."""
        return self.per_million_prompt_tokens > 0 or self.per_million_completion_tokens > 0

    def cost(self, seconds: float, prompt_tokens: float, completion_tokens: float) -> float:
        """What this time and these tokens cost."""
        return (
            self.per_hour * seconds / 3600
            + self.per_million_prompt_tokens * prompt_tokens / 1e6
            + self.per_million_completion_tokens * completion_tokens / 1e6
        )


def _is_price(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
