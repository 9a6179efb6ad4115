"""From rows to chunks in flight and back: order, folding, the window."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tasks.engines import Done
from vllm_tasks.engines.batching import chunks, fold, generate, in_rounds, is_deterministic, side_by_side
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import InvalidCall, ServerUnavailable
from vllm_tasks.rows import Choice, Completion, Request, Result, RowError

GREEDY = {"temperature": 0}
PROMPTS = st.one_of(
    st.text("abc", max_size=3),
    st.lists(
        st.fixed_dictionaries({"role": st.just("user"), "content": st.text("ab", max_size=2)}),
        min_size=1,
        max_size=2,
    ),
)


def words_of(prompt: object) -> str:
    return f"re {prompt}"


class ScriptedEngine:
    """An engine that completes a row after as many turns of the loop as its script says.

    It records chunks, and how many rows were in flight at most.
    """

    def __init__(self, limit: int, turns: Callable[[Request], int] = lambda _: 1) -> None:
        self.window = Window(limit)
        self.turns = turns
        self.chunks: list[list[Any]] = []
        self.seen: list[Any] = []
        self.in_flight = self.most = self.cancelled = 0

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to close."""

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        self.chunks.append([r.prompt for r in requests])
        self.in_flight += len(requests)
        self.most = max(self.most, self.in_flight)
        async with asyncio.TaskGroup() as group:
            for i, request in enumerate(requests):
                task = group.create_task(self.row(i, request, done))
                task.add_done_callback(self.left)

    def left(self, row: asyncio.Task[None]) -> None:
        if row.cancelled() or row.exception():  # an answered row has left already
            self.in_flight -= 1
            self.cancelled += row.cancelled()

    async def row(self, i: int, request: Request, done: Done) -> None:
        for _ in range(self.turns(request)):
            await asyncio.sleep(0)
        result = self.result(request)
        self.in_flight -= 1
        done(i, result)

    def result(self, request: Request) -> Result:
        self.seen.append(request.prompt)
        if isinstance(request.prompt, str) and request.prompt.startswith("bad"):
            return RowError("refused", "bad", index=0)
        return Completion((Choice(words_of(request.prompt)),))


class FailingEngine(ScriptedEngine):
    """Raises for rows whose script says so, after their turns."""

    def result(self, request: Request) -> Result:
        if request.prompt == "die":
            raise ServerUnavailable("gone")
        return super().result(request)


def ask(engine: ScriptedEngine, prompts: Sequence[Any], size: int | None, **sampling: Any) -> list[Result]:
    requests = [
        replace(p, index=i) if isinstance(p, RowError) else Request(p, sampling)
        for i, p in enumerate(prompts)
    ]
    return asyncio.run(generate(engine, requests, size))


def texts(results: Sequence[Result]) -> list[str | tuple[str, int]]:
    return [(r.message, r.index) if isinstance(r, RowError) else r.text for r in results]


# ---------------------------------------------------------------------- pure pieces


@given(st.lists(st.integers()), st.one_of(st.none(), st.integers(1, 9)))
def test_chunks_are_consecutive_and_full(items: list[int], size: int | None) -> None:
    """Put together the chunks are the items; all are full but the last; None gives one."""
    cut = [list(chunk) for chunk in chunks(items, size)]
    assert [item for chunk in cut for item in chunk] == items
    assert all(len(chunk) == (size or len(items)) for chunk in cut[:-1])
    assert all(cut)
    assert size is not None or len(cut) <= 1


@given(st.lists(PROMPTS), st.sampled_from([{}, GREEDY, {"temperature": 0.0, "n": 2}]))
def test_folding_loses_no_row_and_asks_equal_ones_once(prompts: list[Any], sampling: dict[str, Any]) -> None:
    """Every position is in exactly one group, of its own prompt; greedy groups have distinct prompts."""
    folded = fold([Request(p, sampling) for p in prompts])
    assert sorted(i for _, positions in folded for i in positions) == list(range(len(prompts)))
    assert all(prompts[i] == request.prompt for request, positions in folded for i in positions)
    distinct = len({str(p) for p in prompts})
    assert len(folded) == (distinct if sampling == GREEDY else len(prompts))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "n": 1}, True),
        ({"temperature": 0, "n": None}, True),
        ({}, False),
        ({"temperature": None}, False),
        ({"temperature": 0.1}, False),
        ({"temperature": 0, "n": 2}, False),
        ({"temperature": 1, "seed": 1}, False),
    ],
)
def test_only_greedy_single_answers_must_be_equal(sampling: dict[str, Any], expected: bool) -> None:
    """The temperature must be given as 0, because the server's default is unknown."""
    assert is_deterministic(sampling) is expected


def test_a_text_and_messages_of_the_same_letters_are_not_folded() -> None:
    """Prompts that look alike as JSON are still sent separately."""
    messages = [{"role": "user", "content": "x"}]
    requests = [Request('[{"role": "user", "content": "x"}]', GREEDY), Request(messages, GREEDY)]
    assert len(fold(requests)) == 2


def test_common_prefixes_go_out_side_by_side() -> None:
    """Requests are sorted by their text, so that a prefix cache meets its like."""
    folded = fold([Request(p, {}) for p in ["b 1", "a 1", "b 0", "a 0"]])
    assert [request.prompt for request, _ in side_by_side(folded)] == ["a 0", "a 1", "b 0", "b 1"]


# ---------------------------------------------------------------------- answers


@given(
    prompts=st.lists(st.one_of(PROMPTS, st.just("bad"), st.just(RowError("prompt", "no prompt")))),
    size=st.one_of(st.none(), st.integers(1, 5)),
    limit=st.integers(1, 7),
    greedy=st.booleans(),
    turns=st.lists(st.integers(0, 5), min_size=1),
)
def test_answers_come_back_in_input_order(
    prompts: list[Any], size: int | None, limit: int, greedy: bool, turns: list[int]
) -> None:
    """Each row gets its own answer or error, with its own index, in any order of completion."""
    delays = iter(range(10**9))
    engine = ScriptedEngine(limit, lambda _: turns[next(delays) % len(turns)])
    results = ask(engine, prompts, size, **(GREEDY if greedy else {}))
    assert texts(results) == [
        (p.message, i) if isinstance(p, RowError) else ("bad", i) if p == "bad" else words_of(p)
        for i, p in enumerate(prompts)
    ]
    assert engine.window.in_flight == 0
    assert max(map(len, engine.chunks), default=0) <= (size or len(prompts))


@given(
    rows=st.integers(0, 40),
    size=st.one_of(st.none(), st.integers(1, 9)),
    limit=st.integers(1, 12),
    calls=st.integers(1, 3),
)
def test_the_window_is_exceeded_by_no_more_than_a_chunk(
    rows: int, size: int | None, limit: int, calls: int
) -> None:
    """Rows in flight stay under the limit rounded up to full chunks, over all calls together."""
    engine = ScriptedEngine(limit, lambda request: len(str(request.prompt)) % 4)
    requests = [Request(f"{'x' * (i % 5)}{i}", {}) for i in range(rows)]

    async def many() -> list[list[Result]]:
        return await asyncio.gather(*(generate(engine, requests, size) for _ in range(calls)))

    assert [len(r) for r in asyncio.run(many())] == [rows] * calls
    assert engine.most <= limit - 1 + (size or rows or 1)
    assert Counter(engine.seen) == Counter({r.prompt: calls for r in requests})


def test_equal_greedy_rows_are_asked_once() -> None:
    """All copies of a folded row get the answer; sampled rows are sent one by one."""
    engine = ScriptedEngine(8)
    assert texts(ask(engine, ["a", "b", "a", "a"], 4, **GREEDY)) == ["re a", "re b", "re a", "re a"]
    assert sorted(engine.seen) == ["a", "b"]
    engine = ScriptedEngine(8)
    ask(engine, ["a", "b", "a", "a"], 4, temperature=1)
    assert sorted(engine.seen) == ["a", "a", "a", "b"]


def test_a_folded_error_has_each_places_own_index() -> None:
    """One refused request is the error of all rows that share it."""
    results = ask(ScriptedEngine(8), ["bad", "a", "bad"], 4, **GREEDY)
    assert texts(results) == [("bad", 0), "re a", ("bad", 2)]


def test_no_rows_and_rows_without_prompt_need_no_engine() -> None:
    """Without rows nothing is sent."""
    engine = ScriptedEngine(1)
    assert ask(engine, [], 4) == []
    assert texts(ask(engine, [RowError("prompt", "a"), RowError("prompt", "b")], None)) == [
        ("a", 0),
        ("b", 1),
    ]
    assert engine.chunks == []


def test_a_slow_row_holds_its_own_place_only() -> None:
    """The window refills row by row: chunks enter while one row of the first is still running."""
    engine = ScriptedEngine(4, lambda request: 200 if request.prompt == "a slow" else 1)
    prompts = ["a slow", *(f"b{i:02}" for i in range(31))]
    assert len(ask(engine, prompts, 4)) == 32
    assert engine.seen[-1] == "a slow"


def test_a_failed_call_raises_its_reason_bare_and_gives_its_room_back() -> None:
    """The engine's exception arrives unchanged, not in a group, and the window is empty again."""
    engine = FailingEngine(3, lambda request: 2 if request.prompt == "die" else 50)
    with pytest.raises(ServerUnavailable, match="gone"):
        ask(engine, ["a", "b", "die", "x", "y", "z", "zz"], 2)
    assert engine.window.in_flight == 0
    assert engine.cancelled > 0
    assert texts(ask(engine, ["a"], 2)) == ["re a"]


def test_one_failing_call_leaves_its_neighbours_alone() -> None:
    """Two calls share an engine: the failure of one does not affect the other's rows."""
    engine = FailingEngine(2, lambda request: 1 if request.prompt == "die" else 5)

    async def both() -> list[Any]:
        good = [Request(f"{i}", {}) for i in range(9)]
        return await asyncio.gather(
            generate(engine, [Request("die", {}), *good], 1),
            generate(engine, good, 2),
            return_exceptions=True,
        )

    failed, answered = asyncio.run(both())
    assert isinstance(failed, ServerUnavailable)
    assert texts(answered) == [f"re {i}" for i in range(9)]
    assert engine.window.in_flight == 0


@given(
    after=st.integers(0, 12),
    size=st.one_of(st.none(), st.integers(1, 4)),
    limit=st.integers(1, 5),
    rows=st.integers(0, 12),
)
def test_a_cancelled_call_gives_all_its_room_back(
    after: int, size: int | None, limit: int, rows: int
) -> None:
    """A call that is cancelled at any moment leaves an empty window, and the next call completes."""
    engine = ScriptedEngine(limit, lambda _: 3)

    async def cancel_and_go_on() -> list[Result]:
        call = asyncio.create_task(generate(engine, [Request(f"{i}", {}) for i in range(rows)], size))
        for _ in range(after):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert engine.window.in_flight == 0
        return await generate(engine, [Request("next", {})], size)

    assert texts(asyncio.run(cancel_and_go_on())) == ["re next"]
    assert engine.window.in_flight == engine.in_flight == 0


def test_an_invalid_call_found_by_the_engine_stays_one() -> None:
    """One error of several chunks is raised once, with its own type."""

    class Refusing(ScriptedEngine):
        def result(self, request: Request) -> Result:
            raise InvalidCall("no such model")

    with pytest.raises(InvalidCall, match="no such model"):
        ask(Refusing(8), ["a", "b", "c"], 1)


# ---------------------------------------------------------------------- the window


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(1, 5)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("turn"), st.just(0)),
    ),
    max_size=40,
)


@given(limit=st.integers(1, 6), steps=STEPS)
def test_the_window_serves_in_order_and_leaks_no_room(limit: int, steps: list[tuple[str, int]]) -> None:
    """In any mix of entering, leaving and cancelling, the first comes first and all capacity returns."""

    async def play() -> None:
        window = Window(limit)
        inside: list[int] = []
        arrivals: list[tuple[int, asyncio.Task[None]]] = []
        served: list[int] = []

        async def enter(number: int, rows: int) -> None:
            await window.enter(rows)
            served.append(number)
            inside.append(rows)

        for number, (step, value) in enumerate(steps):
            if step == "enter":
                arrivals.append((number, asyncio.create_task(enter(number, value))))
                await asyncio.sleep(0)
            elif step == "leave" and inside:
                window.leave(inside.pop(value % len(inside)))
            elif step == "cancel" and arrivals:
                arrivals[value % len(arrivals)][1].cancel()
            else:
                await asyncio.sleep(0)
            assert window.in_flight <= limit - 1 + 5

        for _ in range(len(arrivals) + 1):
            for _ in range(3):
                await asyncio.sleep(0)
            while inside:
                window.leave(inside.pop())
        await asyncio.wait([task for _, task in arrivals] or [asyncio.create_task(asyncio.sleep(0))])
        assert window.in_flight == 0
        assert served == sorted(served)
        assert {n for n, task in arrivals if not task.cancelled()} == set(served)

    asyncio.run(play())


def test_a_turn_that_comes_with_a_cancellation_is_passed_on() -> None:
    """Capacity given to a call at the moment it is cancelled goes to the next in line."""

    async def play() -> int:
        window = Window(1)
        await window.enter(1)
        first, second = asyncio.create_task(window.enter(1)), asyncio.create_task(window.enter(1))
        await asyncio.sleep(0)
        window.leave()  # the first one's turn
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        await second
        return window.in_flight

    assert asyncio.run(play()) == 1


def test_a_late_comer_does_not_overtake() -> None:
    """While somebody waits, new rows queue behind, even if they would fit."""

    async def play() -> list[str]:
        window, order = Window(2), list[str]()

        async def enter(name: str, rows: int) -> None:
            await window.enter(rows)
            order.append(name)

        await window.enter(2)
        big, small = asyncio.create_task(enter("big", 2)), asyncio.create_task(enter("small", 1))
        await asyncio.sleep(0)
        window.leave(1)
        late = asyncio.create_task(enter("late", 1))
        await asyncio.sleep(0)
        window.leave(1)
        await asyncio.sleep(0)
        window.leave(2)
        await asyncio.wait([big, small, late])
        return order

    assert asyncio.run(play()) == ["big", "small", "late"]


def test_a_row_may_get_a_further_request_before_its_result() -> None:
    """It takes a slot like any other; folded rows share it; only the last result is reported."""
    engine = ScriptedEngine(2)
    prompts = ["bad a", "b", "bad a", *(f"c{i}" for i in range(20))]
    reported = Counter[int]()

    def again(request: Request, result: Result) -> Request | Result:
        if not isinstance(result, RowError):
            return result
        assert isinstance(request.prompt, str)
        return replace(request, prompt=request.prompt.removeprefix("bad "))

    requests = [Request(p, GREEDY) for p in prompts]
    done = lambda i, _result: reported.update([i])  # noqa: E731
    results = asyncio.run(generate(engine, requests, 1, done, again))
    assert texts(results) == [words_of(p.removeprefix("bad ")) for p in prompts]
    assert reported == Counter(range(len(prompts)))
    assert Counter(engine.seen)["a"] == 1
    assert engine.most <= 2
    assert engine.window.in_flight == 0


def test_a_pool_gets_the_further_requests_of_all_rows_at_once() -> None:
    """Each round has the rows that are left; errors keep the position that they have in the call."""
    rounds: list[list[str]] = []

    def process(requests: Sequence[Request | RowError]) -> list[Result]:
        rounds.append([str(r.prompt) for r in requests if isinstance(r, Request)])
        return [
            replace(r, index=i) if isinstance(r, RowError) else Completion((Choice(str(r.prompt)),))
            for i, r in enumerate(requests)
        ]

    def again(request: Request, result: Result) -> Request | Result:
        assert isinstance(result, Completion)
        if request.prompt == "lost":
            return RowError("output", "no")
        return replace(request, prompt=result.text[1:]) if result.text.startswith("!") else result

    bad = RowError("prompt", "none", index=1)
    requests = [Request("!!a", GREEDY), bad, Request("b", GREEDY), Request("!lost", GREEDY)]
    a, error, b, lost = in_rounds(process, requests, again)
    assert rounds == [["!!a", "b", "!lost"], ["!a", "lost"], ["a"]]
    assert (a.text, b.text) == ("a", "b")  # type: ignore[union-attr]
    assert error == bad
    assert (lost.kind, lost.index) == ("output", 3)  # type: ignore[union-attr]


def test_a_failed_round_has_what_was_final_before() -> None:
    """The error of a later round keeps the results of the rows that needed none."""

    def process(requests: Sequence[Request | RowError]) -> list[Result]:
        if len(requests) < 2:
            raise ServerUnavailable("gone")
        return [Completion((Choice("x"),)) for _ in requests]

    def again(request: Request, result: Result) -> Request | Result:
        return request if request.prompt == "again" else result

    with pytest.raises(ServerUnavailable) as failed:
        in_rounds(process, [Request("a", GREEDY), Request("again", GREEDY)], again)
    assert failed.value.results == [Completion((Choice("x"),)), None]


def test_a_row_that_would_be_sent_again_while_its_call_ends_is_dropped() -> None:
    """An engine gives all calls their results in one task, which an exception would end for all of them."""

    class Shared(ScriptedEngine):
        async def generate(self, requests: Sequence[Request], done: Done) -> None:
            self.done = done
            sent.set()
            await asyncio.Event().wait()

    engine, sent = Shared(2), asyncio.Event()

    def again(request: Request, _result: Result) -> Request:
        return request

    async def cancel_and_complete() -> None:
        call = asyncio.create_task(generate(engine, [Request("a", {})], None, follow_up=again))
        await sent.wait()
        call.cancel()
        await asyncio.sleep(0)  # the call has cancelled its chunk, which has not noticed yet
        engine.done(0, Completion((Choice("x"),)))
        await asyncio.wait([call])
        assert call.cancelled()

    asyncio.run(cancel_and_complete())
    assert engine.window.in_flight == 0
