"""Runs an engine in a thread of its own, for asynchronous code."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any

from jlora.serve.engine import Engine, Request, Token

logger = logging.getLogger(__name__)
PAUSE = 1.0  # seconds after which an empty list shows that there is no news


class EngineThread:
    """An engine that steps while requests wait or run.

    Args:
      on_failure: called in the thread if a step fails, after which no request can be answered.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None]) -> None:
        self.engine, self.failed = engine, False
        self._on_failure, self._stopping = on_failure, False
        self._wake = threading.Event()
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def tokens(self, request: Request) -> AsyncGenerator[list[Token]]:
        """Yields the answer's tokens as they come, in lists that may be empty; cancels a request that nobody reads on.

        Raises:
          RuntimeError: the engine has failed.
        """
        loop, news, read = asyncio.get_running_loop(), asyncio.Event(), 0

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended with the server
                loop.call_soon_threadsafe(news.set)

        request.notify = notify
        self.engine.submit(request)
        self._wake.set()
        try:
            while True:
                if self.failed:
                    raise RuntimeError("the engine has failed")
                ended = request.finish  # before the tokens, which are complete once it is set
                new, read = request.answer[read:], len(request.answer)
                yield new
                if ended:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), PAUSE)
                news.clear()
        finally:
            self.engine.cancel(request)
            self._wake.set()

    async def between_steps(self, call: Callable[[], Any]) -> Any:
        """Returns the result of a call that is made in the engine's thread, between two steps."""
        made: Future[Any] = Future()
        self._calls.append((call, made))
        self._wake.set()
        return await asyncio.wrap_future(made)

    def stop(self) -> None:
        """Ends the thread after the current step."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping:
            while self._calls:
                call, made = self._calls.pop(0)
                try:
                    made.set_result(call())
                except Exception as error:  # it belongs to whoever has asked
                    made.set_exception(error)
            if self.failed or not self.engine.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                self.engine.step()
            except Exception:
                logger.exception("The engine has failed")
                self.failed = True
                for request in self.engine.requests():
                    request.notify()
                self._on_failure()
