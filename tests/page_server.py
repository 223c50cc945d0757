"""A small server for the chat page, in place of the real one: it answers by rule, and keeps what it was sent."""

import asyncio
import json
import re
import secrets
import socket
import threading

import uvicorn
from conftest import ROOT
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

EVIL = "<img src=x onerror=window.hacked=1>"
MODELS = ["base", "law", EVIL]
LONG = "w" * 500
ANSWERS = {
    "evil": "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>",
    "long": f"{LONG} \N{SCALES} https://example.org/{'a/' * 200}\n\nשלום עולם\n    return {LONG}",
}


def policy(nonce: str) -> str:
    """Returns the Content-Security-Policy under which the page must work."""
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def problem(status: int, message: str) -> JSONResponse:
    """Returns an error as the OpenAI API writes it."""
    return JSONResponse({"error": {"message": message}}, status)


class PageServer:
    """Serves the page on a free port.

    `chats` and `feedback` are the bodies that it got. The other attributes set what it does.
    """

    def __init__(self) -> None:
        self.reset()
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        paths = {"/": self.page, "/v1/models": self.models, "/health": self.health}
        posts = {"/v1/chat/completions": self.chat, "/feedback": self.rate}
        routes = [Route(path, end) for path, end in paths.items()]
        routes += [Route(path, end, methods=["POST"]) for path, end in posts.items()]
        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()

    def reset(self) -> None:
        """Forgets what was sent, and behaves as usual again."""
        self.chats: list[dict] = []
        self.feedback: list[dict] = []
        self.types: set[str] = set()
        self.key, self.takes_feedback, self.feedback_works = "", True, True
        self.holds_refusals_of = ""  # a model, whose refusals wait until another one answers
        self.stopped, self.goes_on = threading.Event(), False

    def close(self) -> None:
        """Ends the server and its thread."""
        self.server.should_exit = True
        self.thread.join(timeout=10)

    def refuses(self, request: Request) -> bool:
        """Tells whether a request lacks the key."""
        return bool(self.key) and request.headers.get("authorization") != f"Bearer {self.key}"

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe()
        text = (ROOT / "jlora/serve/page.html").read_text()
        return HTMLResponse(text.replace("__NONCE__", nonce), headers={"Content-Security-Policy": policy(nonce)})

    async def models(self, request: Request) -> Response:
        if self.refuses(request):
            return problem(401, "no key")
        return JSONResponse({"object": "list", "data": [{"id": name} for name in MODELS]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "feedback": self.takes_feedback})

    async def rate(self, request: Request) -> Response:
        self.types.add(request.headers["content-type"])
        if self.refuses(request):
            return problem(401, "no key")
        if not self.feedback_works:
            return problem(500, "The disk is full.")
        self.feedback.append(await request.json())
        return Response(status_code=204)

    async def chat(self, request: Request) -> Response:
        self.types.add(request.headers["content-type"])
        body = await request.json()
        if self.refuses(request):
            while self.holds_refusals_of == body["model"]:
                await asyncio.sleep(0.01)
            return problem(401, "no key")
        self.holds_refusals_of = ""
        self.chats.append(body)
        if body["messages"][-1]["content"] == "refuse":
            return problem(400, "This request is too long.")
        return StreamingResponse(self.answer(body), media_type="text/event-stream")

    async def answer(self, body: dict):
        """Yields an answer, cut at odd bytes: "slow" stops until `goes_on`, and "break" ends with an error."""
        question = body["messages"][-1]["content"]
        turn = sum(message["role"] == "user" for message in body["messages"])
        answer = ANSWERS.get(question, f"{body['model']} answers {turn}: {question}")
        events = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": piece}}]} for piece in re.findall(r"(?s).{1,40}", answer)]
        if question == "break":
            events.append({"error": {"message": "The accelerator is out of memory."}})
        text = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events)
        if question == "slow":
            yield text
            try:
                while not self.goes_on:
                    await asyncio.sleep(0.01)
            finally:
                self.stopped.set()
        data = f"{text}data: [DONE]\n\n".encode()
        for start in range(0, len(data), 37):
            yield data[start : start + 37]
            await asyncio.sleep(0.02 if start < 150 else 0)  # the browser sees the first pieces one by one
