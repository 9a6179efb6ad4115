"""The requests and commits before each fault, and the check at the end of every run.

A prompt identifies its row: that of the row with the key 7 begins with `t7`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from tests.places import Place
from vllm_tasks import InvalidCall

OF_A_RUN = {"_uuid", "_created_at", "_seconds"}
"""Columns that differ between any two runs."""
OF_THE_MODEL = {"output", "_completion_tokens"}
"""Greedy answers of a real engine differ with what else is in its batch; with `ignore_eos` not in length."""
SHOWN = 5
UNDISTURBED = "undisturbed"

Asked = Callable[[], Counter[int]]
"""The number of requests for each row so far."""


class Broken(AssertionError):
    """A run that did not keep the promise."""


@dataclass
class Figures:
    """The figures of one run."""

    kind: str
    outputs: str
    rows: int
    faults: int = 0
    lost: int = 0
    doubled: int = 0
    differ: int = 0
    again: int | None = 0
    bound: int | None = 0
    """None where nobody counts the requests."""


@dataclass
class Ledger:
    """The ledger of one run over the rows 0 to `rows - 1` of `place`."""

    kind: str
    place: Place
    rows: int
    seed: int
    asked: Asked
    exact: bool = True
    """Whether answers follow from prompts alone; else their texts are not compared."""
    needs: Callable[[int], int] = lambda _: 1
    """The requests that a row takes without faults: two if its answer is sent back once."""
    text: Callable[[int], str] = "t{}".format
    moments: list[str] = field(default_factory=list)
    due: Counter[int] = field(default_factory=Counter)
    """The number of requests that a row may have had beyond those that it needs."""
    spare: int = 0
    """Requests beyond those that are nobody's in particular: each cut connection may cost one."""
    _seen: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place.fill_texts(*map(self.text, range(self.rows)))

    def committed(self, predict_id: str = "m") -> list[dict[str, Any]]:
        try:
            found = self.place.outputs(predict_id)
        except InvalidCall:  # not made yet
            return []
        return [{**row, "id": int(row["id"])} for row in found]  # a key of a CSV file is a text

    def fault(self, moment: str) -> None:
        """Some response was broken or refused, but the client lives: it may not repeat completed rows."""
        self.moments.append(moment)

    def death(self, moment: str, before: Collection[int] | None = None) -> None:
        """The client is dead: rows that it had sent and not committed may be sent anew, and no others.

        Rows that are committed now must stay unchanged to the end. `before`: the keys that were committed
        before the death, if other clients live on, which send and commit rows until we look.
        """
        self.fault(moment)
        now = {row["id"]: row for row in self.committed()}
        self._keep(now)
        done = now.keys() if before is None else before
        sent = {key: n - self.due[key] for key, n in self.asked().items() if key not in done}
        self.due.update({key: min(n, self.needs(key)) for key, n in sent.items() if n > 0})

    def check(self, failed: Collection[int] = ()) -> Figures:
        """Every row is there once and as undisturbed, with no more requests than the faults permit.

        `failed`: rows that end as errors. Raises `Broken` with everything that reproduces the failure.
        """
        found, plain = self.committed(), self.committed(UNDISTURBED)
        times = Counter(row["id"] for row in found)
        by_key = {row["id"]: row for row in found}
        more = {key: n - self.needs(key) for key, n in self.asked().items()}
        again = {key: n for key, n in more.items() if n > 0}
        over = {key: n - self.due[key] for key, n in again.items() if n > self.due[key]}
        lost = [key for key in range(self.rows) if key not in times]
        doubled = [key for key, n in times.items() if n > 1]
        differ = self._differences(by_key, plain, failed)
        problems = {
            "lost": lost,
            "doubled": doubled,
            "not of the source": [key for key in times if key not in range(self.rows)],
            "differ from the undisturbed run": differ,
            "not in the undisturbed run": sorted({*range(self.rows)} - {row["id"] for row in plain}),
            "errors of the undisturbed run": [row["id"] for row in plain if row["_error"]],
            "no errors": [key for key in failed if key in by_key and not by_key[key]["_error"]],
            f"asked oftener than {self.spare} spare": over if sum(over.values()) > self.spare else [],
        }
        if any(problems.values()):
            raise Broken(self._told(problems))
        return Figures(
            self.kind,
            self.place.kind,
            self.rows,
            len(self.moments),
            len(lost),
            len(doubled),
            len(differ),
            sum(again.values()),
            sum(self.due.values()) + self.spare,
        )

    def _keep(self, now: dict[int, dict[str, Any]]) -> None:
        changed = [key for key, row in self._seen.items() if now.get(key) != row]
        if changed:
            raise Broken(self._told({"committed, and changed or gone since": changed}))
        self._seen = now

    def _differences(
        self, found: dict[int, dict[str, Any]], plain: list[dict[str, Any]], failed: Collection[int]
    ) -> list[str]:
        left_out = OF_A_RUN if self.exact else OF_A_RUN | OF_THE_MODEL
        told = []
        for row in plain:
            other = found.get(row["id"])
            if other is None or row["id"] in failed:
                continue
            columns = [c for c in row if c not in left_out and row[c] != other[c]]
            told += [f"{row['id']}: {c} is {other[c]!r}, not {row[c]!r}" for c in columns]
        changed = [key for key, row in self._seen.items() if found.get(key) != row]
        told += [f"{key}: committed, and changed since" for key in changed]
        return told

    def _told(self, problems: dict[str, Any]) -> str:
        lines = [f"{self.kind} over {self.place.kind}, --seed {self.seed}", *self.moments]
        for what, rows in problems.items():
            if rows:
                shown = list(rows.items() if isinstance(rows, dict) else rows)[:SHOWN]
                lines.append(f"{len(rows)} {what}: {', '.join(map(str, shown))}")
        return "\n".join(lines)
