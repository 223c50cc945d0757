"""The server's application in this process, with an engine that is slow or fails."""

import asyncio
import json
import time

import httpx
import pytest
from programs import wait_for

from jlora.serve import loading
from jlora.serve.answering import Answering, Limits
from jlora.serve.engine_thread import EngineThread
from jlora.serve.metrics import Metrics
from jlora.serve.served_models import ServedModels
from jlora.serve.server import Server

pytestmark = pytest.mark.slow
ASKED = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def engine_of(small_base):
    """A generator without adapters, and its engine."""
    generator = loading.load_model(str(small_base)).generator
    return generator, generator.make_engine(2, 256)


@pytest.fixture
def application(engine_of):
    """Returns a function of limits that makes an application; and its engine, its thread, and reported failures."""
    generator, engine = engine_of
    failures, threads = [], []

    def make(**limits):
        threads.append(EngineThread(engine, on_failure=lambda: failures.append("failed")))
        models = ServedModels(generator.adapters, generator.directory, None, "")
        metrics, some = Metrics(engine), Limits(**limits)
        answering = Answering(generator, models, threads[-1], metrics, (), some)
        return Server(answering, models, threads[-1], metrics, some).app(["*"])

    yield make, engine, failures
    for thread in threads:
        thread.stop()
    for request in engine.requests():
        engine.cancel(request)
    engine.run()


def ask(app, *calls):
    """Returns the answers of an application to calls that are made at the same time: (path, body or None)."""

    async def all_answers():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            made = [client.post(path, json=body) if body is not None else client.get(path) for path, body in calls]
            return await asyncio.gather(*made)

    return asyncio.run(all_answers())


def chat(**changes):
    """A call for an answer."""
    return "/v1/chat/completions", {**ASKED, **changes}


def events(answer):
    """Returns the events of a stream."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_that_takes_too_long(application, monkeypatch):
    make, engine, _ = application
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.3), step())[1])
    whole, stream = ask(make(seconds=0.8), chat(max_tokens=100), chat(max_tokens=100, stream=True))
    assert whole.status_code == 504 and "took too long" in whole.json()["error"]["message"]
    *_, last = events(stream)
    assert stream.status_code == 200 and last["error"]["message"] == "The answer took too long."
    wait_for(lambda: not engine.busy, seconds=10)
    assert engine.free_tokens == 256


def test_an_engine_that_fails_says_so(application, monkeypatch, caplog):
    make, engine, failures = application
    app, step, steps = make(), engine.step, []
    assert ask(app, chat())[0].status_code == 200

    def fail():
        if len(steps) == 2:
            raise ValueError("out of memory")
        steps.append(step())

    monkeypatch.setattr(engine, "step", fail)
    whole, stream = ask(app, chat(max_tokens=100), chat(max_tokens=100, stream=True))
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
    assert events(stream)[-1]["error"]["message"] == "the engine has failed"
    assert failures == ["failed"] and "out of memory" in caplog.text
    health, again, streamed, models, metrics = ask(
        app, ("/health", None), chat(), chat(stream=True), ("/v1/models", None), ("/metrics", None)
    )
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert again.status_code == streamed.status_code == 503 and "engine has failed" in again.text
    assert models.status_code == metrics.status_code == 200 and "out of memory" not in whole.text + stream.text


def test_a_bug_ends_a_stream_at_once(application, monkeypatch, caplog):
    make, engine, _ = application
    monkeypatch.setattr("jlora.serve.answer_text.AnswerText.push", lambda *_: 1 / 0)
    whole, stream = ask(make(), chat(), chat(stream=True))
    assert whole.status_code == 500 and "division" not in whole.text + stream.text
    assert events(stream)[-1]["error"]["message"] == "The server has failed. Its log says why."
    assert "ZeroDivisionError" in caplog.text
    wait_for(lambda: not engine.busy, seconds=10)


def test_a_burst_fills_the_queue_and_no_more(application, monkeypatch):
    make, engine, _ = application
    most, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (submit(request), most.append(len(engine.waiting))))
    got = ask(make(queue=3), *[chat(stream=i % 2 == 0) for i in range(20)])
    codes = [answer.status_code for answer in got]
    assert set(codes) == {200, 429} and codes.count(200) >= 5 and max(most) <= 5  # two places


def test_what_no_option_asks_for_is_not_there(application):
    make, _, _ = application
    body = {"lora_name": "x", "lora_path": "x"}
    got = ask(make(), ("/v1/load_lora_adapter", body), ("/v1/unload_lora_adapter", body), ("/feedback", body))
    assert [answer.status_code for answer in got] == [404] * 3
