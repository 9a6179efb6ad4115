"""Rows over HTTP: pooled connections, retries and failover, for any server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from vllm_tasks.engines import Done, wire
from vllm_tasks.engines.http.attempts import Attempts
from vllm_tasks.engines.http.connections import Names
from vllm_tasks.engines.http.control import STRUCTURED, Control, lacks_template
from vllm_tasks.engines.http.failures import FULL, Denied, FailedAttempt, Full, Unreachable
from vllm_tasks.engines.http.files import most_connections
from vllm_tasks.engines.http.servers import Server, Servers, Template
from vllm_tasks.engines.http.streaming import streamed
from vllm_tasks.engines.http.transport import HttpConfig, Transport, refusal
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Completion, Conversation, Request, Result, RowError, given_up

logger = logging.getLogger(__name__)

GATEWAY = {502, 503, 504}
"""Statuses of a gateway whose server is down. vLLM itself returns 503 when its engine is dead."""
TEMPLATES = {True: Template.THERE, False: Template.ABSENT, None: Template.UNREPORTED}
"""What a server's report says of its chat template."""


class HttpEngine:
    """An `Engine` that sends each row as one HTTP request.

    The `window` admits the rows of all calls in complete chunks, so it may be exceeded by one chunk. Of
    these rows only those with a slot at a server become tasks; see `Servers`.
    """

    has_failed = False  # because a server may come back

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        most = most_connections(config.max_in_flight, len(config.endpoints))
        self.window = Window(most * len(config.endpoints))
        self._credentials = config.credentials
        self._names = Names()
        self._control = Control(self._credentials)
        self._transport = Transport(config, self._control.tls, self._names)
        model = "" if config.protocol == "legacy" else config.model  # legacy has no names
        self._servers = Servers(
            config.endpoints, model, self._control, config.grace_period, most, self._repeat
        )
        self._completed: dict[str, Request] = {}  # the last one, by path
        self._at_work: Counter[str] = Counter()  # rows that have a slot, by path
        self._denied: Counter[str] = Counter()
        self._asking_for_template = asyncio.Lock()

    async def start(self) -> None:
        await self._transport.open()

    async def close(self) -> None:
        await self._transport.close()

    async def facts(self) -> dict[str, str]:
        """Facts that a server reports about itself; see `Servers.facts`."""
        return await self._servers.facts()

    async def check_served(self, max_tokens: int | None) -> None:
        """See `Control.check_served`."""
        await self._servers.check_served(max_tokens)

    async def has_chat_template(self) -> bool | None:
        """Ask once, at one server; None if it does not report it, as gateways do not."""
        async with self._asking_for_template:
            if self._servers.template is Template.UNASKED:
                await self._servers.compare()
                self._servers.template = TEMPLATES[await self._reported_template()]
            return {Template.THERE: True, Template.ABSENT: False}.get(self._servers.template)

    @property
    def refuses_chat(self) -> bool:
        """Whether a server has refused chat because the model has no chat template."""
        return self._servers.template is Template.REFUSED

    async def _reported_template(self) -> bool | None:
        """The report of the first server that responds. If none does, one is waited for."""
        for server in self._servers.all:
            try:
                return await self._template_of(server)
            except Unreachable as error:
                self._servers.lose(server, str(error))
        with suppress(Unreachable):  # some gateways close the connection for a path that they do not know
            return await self._template_of(await self._servers.first_identified())
        return None

    async def _template_of(self, server: Server) -> bool | None:
        await self._servers.identify(server)
        assert server.model is not None
        return await self._control.has_chat_template(server.endpoint, server.model)

    def _refuse_chat(self, refusal: RowError) -> None:
        """Note that a row was refused for want of a chat template."""
        if not self.refuses_chat:
            self._servers.template = Template.REFUSED
            logger.warning(
                "texts are sent as plain text: %s refuses chat, because the model has no chat template (%s); "
                "chat=False sends them so from the first row on",
                ", ".join(map(str, self.config.endpoints)), refusal.message,
            )  # fmt: skip

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        await self._servers.compare()
        if any(request.sampling.get(STRUCTURED) for request in requests):
            await self._servers.check_structure()
        async with asyncio.TaskGroup() as group:
            for i, request in enumerate(requests):
                attempts = Attempts(self.config.retries, self._servers)
                attempts.server = await self._servers.take_slot()
                task = group.create_task(self._row(i, request, attempts, done))
                # In a callback too: a task that is cancelled before its first step releases nothing itself.
                task.add_done_callback(lambda _, attempts=attempts: attempts.release())  # type: ignore[misc]

    async def _row(self, i: int, request: Request, attempts: Attempts, done: Done) -> None:
        done(i, await self._process(request, attempts))

    async def _process(self, request: Request, attempts: Attempts) -> Result:
        """Send the row until it has an answer or an error. Raises the errors of the call."""
        while True:
            if self.refuses_chat and isinstance(request.prompt, Conversation):
                request = replace(request, prompt=text_of(request.prompt))
            server = attempts.server = attempts.server or await self._servers.take_slot()
            try:
                outcome = await self._outcome(server, request, attempts)
            except Unreachable as error:
                self._servers.lose(server, str(error))
                if self._names.are_carried:
                    self._servers.heartbeat()
                outcome = attempts.lose(str(error))
            except Full as full:
                attempts.release()  # because `refuse` checks whether other rows have slots
                outcome = attempts.refuse(full)
            finally:
                attempts.release()
            is_conversation = isinstance(request.prompt, Conversation)
            if isinstance(outcome, RowError) and is_conversation and lacks_template(outcome.message):
                self._refuse_chat(outcome)
            elif not isinstance(outcome, float):
                return outcome
            else:
                await asyncio.sleep(outcome)

    async def _outcome(self, server: Server, request: Request, attempts: Attempts) -> Result | float:
        """The answer, the row's own error, or the seconds until the next attempt.

        Raises `Unreachable` and `Full` if the server is to blame, `InvalidCall` if the call is.
        """
        path = wire.path_of(self.config.protocol, request)
        self._at_work[path] += 1
        try:
            await self._servers.trust(server)
            return await self._attempt(server, request)
        except Full:
            raise
        except Denied as denied:
            if denied.status != 404 or "model" not in request.sampling:  # else the row's own name is wrong
                await self._blame(server, path, denied)
            return attempts.fail(denied)
        except FailedAttempt as failed:
            outcome = attempts.fail(failed)
            if isinstance(outcome, RowError) and failed.may_be_the_servers:
                await self._blame(server, path, failed)
            return outcome
        finally:
            self._at_work[path] -= 1

    async def _blame(self, server: Server, path: str, failed: FailedAttempt) -> None:
        """Return if the row is to blame, because this server completes other rows; else raise its error.

        The row keeps its slot until that is known, so that the remaining rows are not all sent meanwhile.
        """
        if isinstance(failed, Denied) and not await self._others_complete(path):
            self._servers.forget_model()
            raise failed.of_the_call()
        if completed := self._completed.get(path):
            await self._servers.prove(server, completed)
        elif self.window.in_flight > 1:  # no request to repeat: only its health is known
            await self._servers.check(server)

    async def _others_complete(self, path: str) -> bool:
        """Whether any row of this path has completed; False once all of its rows with slots are denied."""
        self._denied[path] += 1
        try:
            while path not in self._completed and self._denied[path] < self._at_work[path]:
                self._servers.news.clear()
                await self._servers.news.wait()
            return path in self._completed
        finally:
            self._denied[path] -= 1

    async def _repeat(self, server: Server, completed: Request) -> None:
        """Repeat a request that has completed before. Raises the errors of `_outcome`."""
        try:
            await self._attempt(server, completed)
        except Full:
            raise
        except Denied as denied:
            self._servers.forget_model()
            raise denied.of_the_call() from denied
        except FailedAttempt as failed:
            if not failed.is_refusal:
                raise Unreachable(failed.message) from failed

    async def _attempt(self, server: Server, request: Request) -> Completion:
        """Send one request. Raises `Unreachable`, `FailedAttempt` or `InvalidCall`."""
        with self._names.new() as name:
            return await self._send(server, request, name)

    async def _send(self, server: Server, request: Request, name: str) -> Completion:
        path = wire.path_of(self.config.protocol, request)
        model = None if path == "/generate" else server.model
        try:
            fields = wire.body_of(request, model)
            # vLLM silently leaves the prompt's logprobs out of a stream.
            streams = self.config.stream and fields.get("prompt_logprobs") is None
            body = json.dumps(streamed(fields) if streams else fields).encode()
        except (TypeError, ValueError) as error:  # prompts have been checked
            raise InvalidCall(f"a sampling parameter cannot be sent: {error}") from error
        sent = time.monotonic()
        try:
            response, status, content = await self._transport.post(server.endpoint, path, body, name)
        except FailedAttempt as failed:
            if failed.kind == "timeout":
                server.capacity.time_out(sent)
            if isinstance(failed, Full):
                server.capacity.refuse(None)
            raise
        seconds = time.monotonic() - sent
        if status not in FULL:
            self._servers.complete(server, sent)
        if status != 200:
            refused = refusal(status, response, server.endpoint.shown(path), content, self._credentials)
            if status in GATEWAY and "Retry-After" not in response.headers:
                await self._servers.check(server)  # raises if the server is down
            if isinstance(refused, Full):
                server.capacity.refuse(refused.delay)
            raise refused
        completion = self._completion(server, path, request, name, content)
        self._completed[path] = request
        return replace(completion, seconds=seconds)

    def _completion(
        self, server: Server, path: str, request: Request, name: str, content: bytes
    ) -> Completion:
        """The completion in a body. Raises `FailedAttempt` if it is not one for the request `name`."""
        try:
            answer = json.loads(content)
            if self._names.is_of_another(answer, name):
                raise FailedAttempt(
                    "connection", f"{server.endpoint} answered another request", retryable=True
                )
            if reason := wire.withheld(answer):
                words = self._credentials.hidden_in(reason)
                raise FailedAttempt("refused", f"{server.endpoint} withheld the answer ({words})")
            completion = wire.parse(path, request, answer)
        except (ValueError, RecursionError) as error:
            raise self._transport.unreadable(
                error, f"the response from {server.endpoint}", content
            ) from error
        if reason := given_up(completion):
            raise FailedAttempt("server", f"{server.endpoint} ended the row early ({reason})", retryable=True)
        return completion


def text_of(conversation: Conversation) -> str:
    """The text of a conversation. Raises `InvalidCall` for a system text, which only chat can carry."""
    if conversation[0]["role"] == "system":
        raise InvalidCall(
            "system needs chat messages, and the model has no chat template: put the words into the prompt"
        )
    return conversation.text
