"""The HTTP server: OpenAI's API over an engine, a page to chat with, and what an operator needs."""

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as Http
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jlora.common.errors import UserError
from jlora.serve.answering import Answering, Limits, Refused
from jlora.serve.engine_thread import EngineThread
from jlora.serve.feedback import save_feedback
from jlora.serve.metrics import Metrics
from jlora.serve.openai_answers import Json, error, event
from jlora.serve.openai_bodies import AdapterBody, ChatBody, CompletionBody, FeedbackBody, parse_body
from jlora.serve.served_models import ServedModels

PAGE = Path(__file__).with_name("page.html")
ENDING = "The server ends. Try again later."
BODY_SECONDS = 30.0  # time for a client to send a request's body
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """The endpoints.

    Args:
      feedback: directory of what users think of answers; None: they are not asked.
      can_load: whether adapters may be loaded and unloaded while the server runs.
      api_key: what clients must send; "": nothing.
    """

    def __init__(
        self,
        answering: Answering,
        models: ServedModels,
        thread: EngineThread,
        metrics: Metrics,
        limits: Limits,
        *,
        feedback: Path | None = None,
        can_load: bool = False,
        api_key: str = "",
    ) -> None:
        self._answering, self._models, self._thread, self._metrics = answering, models, thread, metrics
        self._limits, self._feedback, self._api_key, self._can_load = limits, feedback, api_key, can_load
        self._running: set[asyncio.Task[Any]] = set()

    def app(self, hosts: list[str]) -> Starlette:
        """Returns the application; it answers requests whose Host header is one of `hosts`, or any with ["*"]."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._checked(self._read_metrics)),
            Route("/v1/models", self._checked(self._list_models)),
            Route("/v1/chat/completions", self._checked(self._chat), methods=["POST"]),
            Route("/v1/completions", self._checked(self._complete), methods=["POST"]),
        ]
        if self._can_load:
            routes += [
                Route("/v1/load_lora_adapter", self._checked(self._load), methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._checked(self._unload), methods=["POST"]),
            ]
        if self._feedback:
            routes.append(Route("/feedback", self._checked(self._take_feedback), methods=["POST"]))
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _server_error}
        return Starlette(
            routes=routes,
            middleware=[Middleware(_Ending, running=self._running), guard],
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._thread.stop)
        if self._running:  # they are cancelled, and say so to their clients
            await asyncio.wait(self._running, timeout=10)

    def _checked(self, endpoint: Callable[[Http], Awaitable[Response]]) -> Callable[[Http], Awaitable[Response]]:
        """Returns an endpoint that asks for the API key, and answers what it refuses in OpenAI's form."""

        async def checked(http: Http) -> Response:
            scheme, _, given = http.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode("latin-1"), self._api_key.encode())
            if self._api_key and not (scheme.lower() == "bearer" and right):
                return _refusal("The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.", 401)
            try:
                return await endpoint(http)
            except UserError as problem:
                return _refusal(str(problem), 400)
            except Refused as refused:
                return _refusal(str(refused), refused.status, refused.code)

        return checked

    async def _page(self, http: Http) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8").replace("__NONCE__", nonce)
        headers = {"Content-Security-Policy": POLICY.format(nonce=nonce), "Referrer-Policy": "no-referrer"}
        headers["X-Content-Type-Options"] = "nosniff"
        return HTMLResponse(text, headers=headers)

    async def _health(self, http: Http) -> Response:
        status = "failed" if self._thread.failed else "ok"
        content = {"status": status, "feedback": self._feedback is not None}
        return JSONResponse(content, 503 if self._thread.failed else 200)

    async def _read_metrics(self, http: Http) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _list_models(self, http: Http) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "jlora"} for name in self._models.names]
        return JSONResponse({"object": "list", "data": models})

    async def _chat(self, http: Http) -> Response:
        return await self._answer(http, parse_body(ChatBody, await self._body(http)))

    async def _complete(self, http: Http) -> Response:
        return await self._answer(http, parse_body(CompletionBody, await self._body(http)))

    async def _answer(self, http: Http, body: ChatBody | CompletionBody) -> Response:
        if self._thread.failed:
            raise Refused("The engine has failed. Its log says why.", 503)
        requests = await self._answering.requests(body)
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            events = self._answering.stream(body, requests)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            return JSONResponse(await _while_connected(http, self._answering.whole(body, requests)))
        except TimeoutError:
            raise Refused("The answer took too long.", 504) from None

    async def _load(self, http: Http) -> Response:
        body = parse_body(AdapterBody, await self._body(http))
        form = await asyncio.to_thread(self._models.read, body.lora_name, body.lora_path)
        await self._thread.between_steps(lambda: self._models.add(body.lora_name, form, self._thread.engine))
        return Response(f"Loaded adapter {body.lora_name}.", media_type="text/plain")

    async def _unload(self, http: Http) -> Response:
        body = parse_body(AdapterBody, await self._body(http))
        await self._thread.between_steps(lambda: self._models.remove(body.lora_name))
        return Response(f"Unloaded adapter {body.lora_name}.", media_type="text/plain")

    async def _take_feedback(self, http: Http) -> Response:
        body = parse_body(FeedbackBody, await self._body(http))
        assert self._feedback is not None
        try:
            await asyncio.to_thread(save_feedback, self._feedback, body)
        except OSError as problem:
            raise Refused(f"The feedback cannot be saved: {problem.strerror or problem}", 507) from None
        return Response(status_code=204)

    async def _body(self, http: Http) -> bytes:
        """Returns a request's body.

        Raises:
          Refused: it is too large, arrives too slowly, or is not declared as JSON, which web pages of other sites
            cannot send.
        """
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("Expected the header Content-Type: application/json.", 415)
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    content += part
                    if len(content) > self._limits.body:
                        raise Refused(f"The body is larger than {self._limits.body:,} bytes.", 413)
        except TimeoutError:
            raise Refused(f"The body did not arrive within {BODY_SECONDS:g} seconds.", 408) from None
        return bytes(content)


class _Ending:
    """Answers the requests that the server's end cuts off, instead of a traceback in its log.

    Args:
      running: the tasks of all requests, as they come and go.
    """

    def __init__(self, app: ASGIApp, running: set[asyncio.Task[Any]]) -> None:
        self._app, self._running = app, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, task = False, asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)

        async def pass_on(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, pass_on)
        except asyncio.CancelledError:
            if started:  # only a stream lasts that long
                last = event(error(ENDING, 503)).encode()
                await send({"type": "http.response.body", "body": last, "more_body": False})
            else:
                await _refusal(ENDING, 503)(scope, receive, send)


async def _while_connected(http: Http, work: Coroutine[Any, Any, Json]) -> Json:
    """Returns the result of `work`, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "The client has left.")
        return task.result()
    finally:
        for future in (task, left):
            future.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _refusal(message: str, status: int, code: str | None = None) -> Response:
    return JSONResponse(error(message, status, code), status, headers={"Retry-After": "1"} if status == 429 else None)


async def _http_error(http: Http, problem: HTTPException) -> Response:
    return _refusal(f"{problem.detail.removesuffix('.')}.", problem.status_code)


async def _server_error(http: Http, problem: Exception) -> Response:
    return _refusal("The server has failed. Its log says why.", 500)
