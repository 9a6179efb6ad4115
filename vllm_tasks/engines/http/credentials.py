"""What admits us to a server: a key, a user with a password, and further headers. All may be secrets."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import dataclass, field
from typing import TypeVar

from vllm_tasks.errors import InvalidCall

AUTHORIZATION = "Authorization"
SHORTEST = 4
"""Characters from which the value of a further header is hidden in a server's words. To hide a shorter one,
such as "1", would make them unreadable, and it is no secret."""

Words = TypeVar("Words", str, bytes)


@dataclass(frozen=True)
class Credentials:
    """What admits us to a server. It is sent in headers and appears nowhere else."""

    api_key: str | None = field(default=None, repr=False)
    """A bearer token."""
    basic_auth: str | None = field(default=None, repr=False)
    """`user:password`."""
    more: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Further headers."""

    def headers(self) -> dict[str, str]:
        """The headers of each request. Raises `InvalidCall` for a key that a header cannot carry."""
        if self.api_key and not re.fullmatch("[!-~]+", self.api_key):
            raise InvalidCall(
                "api_key has a space, a line end or another character that an HTTP header cannot carry; "
                "a key read from a file needs .strip()"
            )
        headers = dict(self.more)
        if self.api_key:
            headers[AUTHORIZATION] = f"Bearer {self.api_key}"
        if self.basic_auth:
            headers[AUTHORIZATION] = f"Basic {_encoded(self.basic_auth)}"
        return headers

    def hidden_in(self, words: Words) -> Words:
        """The words of a server without the secrets, which it may have echoed, verbatim or as JSON."""
        if isinstance(words, bytes):
            return self.hidden_in(words.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        for secret in self._secrets():
            in_json = json.dumps(secret)[1:-1]
            for form in (secret, in_json, in_json.replace("/", r"\/")):
                words = words.replace(form, "***")
        return words

    def _secrets(self) -> list[str]:
        """All texts to hide, the longest first."""
        found = [self.api_key] if self.api_key else []
        if self.basic_auth:
            password = self.basic_auth.partition(":")[2]
            found += [self.basic_auth, _encoded(self.basic_auth), *([password] if password else [])]
        for _, value in self.more:
            found += [part for part in (value, value.rpartition(" ")[2]) if len(part) >= SHORTEST]
        return sorted(found, key=len, reverse=True)


def _encoded(basic_auth: str) -> str:
    return b64encode(basic_auth.encode()).decode()
