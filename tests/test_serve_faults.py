"""`jlora serve` against clients that leave, send slowly or too much, full queues and disks, and signals."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from programs import run_module, wait_for
from serving import model_options, served

pytestmark = pytest.mark.slow
HI = [{"role": "user", "content": "Hi"}]
LONG = {"model": "law", "messages": HI, "temperature": 0, "max_tokens": 1900}
# Short limits, so that tests need not wait.
STRICT = """
import sys
from jlora.cli import program, serve
from jlora.serve import connections, server
connections.HEADER_SECONDS, server.BODY_SECONDS, serve.GRACE = 2, 2, 3
program.run_command("serve", sys.argv[1:])
"""


def program(code):
    """The command line of a program."""
    return (sys.executable, "-c", code)


@pytest.fixture(scope="module")
def strict(small_base, small_adapters, tmp_path_factory):
    """A server with short limits and two places in its queue."""
    feedback = tmp_path_factory.mktemp("feedback")
    options = [*model_options(small_base, small_adapters), "--queue", "2", "--feedback", feedback]
    with served(*options, program=program(STRICT)) as server:
        server.feedback = feedback
        yield server


def raw(server, body, path="/v1/chat/completions"):
    """Returns a socket that has sent a request."""
    content = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return client


def ended(client):
    """Returns all that a server still sends until it closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_places_and_blocks_of_clients_that_leave_come_back(strict):
    clients = [raw(strict, {**LONG, "stream": i % 2 == 0}) for i in range(4)]  # all places
    wait_for(lambda: strict.metrics()["jlora_running"] == 4, strict.process)
    clients += [raw(strict, {**LONG, "stream": i % 2 == 0}) for i in range(2)]
    wait_for(lambda: strict.metrics()["jlora_waiting"] == 2, strict.process)
    assert strict.metrics()["jlora_free_cache_tokens"] < 16384 - 4 * 1900
    assert b"text/event-stream" in clients[0].recv(300)
    for client in clients:
        client.close()
    wait_for(strict.idle, strict.process, seconds=10)
    assert strict.metrics()["jlora_free_cache_tokens"] == 16384
    assert strict.text("Hi", "law", max_tokens=3)


def test_a_full_queue_is_reported(strict):
    clients = [raw(strict, LONG) for _ in range(4)]
    wait_for(lambda: strict.metrics()["jlora_running"] == 4, strict.process)
    clients += [raw(strict, {**LONG, "stream": True}) for _ in range(2)]
    wait_for(lambda: strict.metrics()["jlora_waiting"] == 2, strict.process)
    for stream in (False, True):
        refused = strict.post("/v1/chat/completions", **LONG, stream=stream)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
    with pytest.raises(openai.RateLimitError):
        strict.openai.chat.completions.create(**LONG)
    clients.pop().close()
    wait_for(lambda: strict.metrics()["jlora_waiting"] == 1, strict.process, seconds=10)
    clients.append(raw(strict, LONG))
    wait_for(lambda: strict.metrics()["jlora_waiting"] == 2, strict.process, seconds=10)
    for client in clients:
        client.close()
    wait_for(strict.idle, strict.process, seconds=10)


def test_a_burst_does_not_pass_the_queue(strict):
    body = {**LONG, "max_tokens": 2, "n": 1}
    with ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(lambda _: strict.post("/v1/chat/completions", **body).status_code, range(24)))
    assert set(codes) <= {200, 429} and codes.count(200) >= 2
    wait_for(strict.idle, strict.process, seconds=10)


def test_large_bodies_are_refused_before_they_are_read(strict):
    strict.http.get("/health")
    before = strict.memory()

    def parts():
        for _ in range(100):
            yield b" " * (1 << 20)

    for content in (parts(), b" " * (100 << 20)):  # in chunks, and of a known length
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            headers = {"Content-Type": "application/json"}
            answer = strict.http.post("/v1/chat/completions", content=content, headers=headers)
            assert answer.status_code == 413 and "larger than 4,194,304 bytes" in answer.text
    assert strict.memory() - before < 40 << 20
    client = socket.create_connection(("127.0.0.1", strict.port), timeout=20)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(head + b"Content-Length: 104857600\r\n\r\n" + b" " * (5 << 20))
    assert b"413" in client.recv(100)  # without waiting for the rest
    client.close()


def test_a_long_prompt_does_not_keep_others_waiting(strict):
    """Its four million characters take seconds to encode, and then it is refused."""
    prompt = "very " * 800_000
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(strict.post, "/v1/completions", model="law", prompt=prompt)
        while not long.done():
            time.sleep(0.5)
            if strict.http.get("/health").status_code == 200 and strict.text("Hi", "law", max_tokens=1):
                break
        assert not long.done()
        assert long.result().json()["error"]["code"] == "context_length_exceeded"


def test_slow_clients_do_not_keep_others_waiting(strict):
    headers = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(100)]
    bodies = [socket.create_connection(("127.0.0.1", strict.port), timeout=30) for _ in range(20)]
    stop = threading.Event()

    def drip():
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for client in bodies:
            client.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        for letter in (head * 99).decode():
            for client in headers:
                with contextlib.suppress(OSError):
                    client.sendall(letter.encode())
            if stop.wait(0.1):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        for _ in range(3):
            assert strict.text("Hi", "law", max_tokens=3)
        for client in bodies:
            assert b"408" in client.recv(1000)
        for client in headers:  # closed, although bytes still arrive
            client.settimeout(30)
            assert ended(client) == b""
    finally:
        stop.set()
        thread.join()
        for client in headers + bodies:
            client.close()
    assert strict.text("Hi", "law", max_tokens=3)


def test_a_second_header_has_a_time_limit_too(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(1000)
        client.sendall(b"GET /hea")
        assert ended(client) == b""


def test_feedback_on_a_full_disk(strict):
    turns = [{"role": "user", "content": "Q" * 1000}]
    row = {"model": "law", "messages": turns, "answer": "a" * 100, "rating": "up", "better": "b" * 100}
    limits = resource.prlimit(strict.process.pid, resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    codes = [strict.post("/feedback", **row).status_code for _ in range(5)]
    assert codes[0] == 204 and codes[-1] == 507 and set(codes) == {204, 507}
    for name in ("rows.jsonl", "pairs.jsonl"):  # whole lines, as many in both files
        lines = (strict.feedback / name).read_text().split("\n")
        assert lines.pop() == "" and len(lines) == codes.count(204) and all(json.loads(line) for line in lines)
    assert "cannot be saved: " in strict.post("/feedback", **row).json()["error"]["message"]
    short = {**row, "messages": HI, "better": None}
    assert strict.post("/feedback", **short).status_code == 204
    resource.prlimit(strict.process.pid, resource.RLIMIT_FSIZE, limits)
    (strict.feedback / "rows.jsonl").unlink()
    (strict.feedback / "rows.jsonl").symlink_to("/dev/full")
    assert strict.post("/feedback", **short).status_code == 507
    assert strict.text("Hi", "law", max_tokens=3)


def test_sigterm_under_load(small_base, small_adapters):
    """Requests that end in time are answered; the others are cut off; nobody can connect any more."""
    options = model_options(small_base, small_adapters)
    with served(*options, program=program(STRICT.replace("2, 2, 3", "2, 2, 8"))) as server:
        short = {**LONG, "max_tokens": 60}
        expected = server.text("Hi", "law", max_tokens=60)
        with ThreadPoolExecutor(6) as pool:
            clients = [raw(server, LONG), raw(server, {**LONG, "stream": True})]
            wait_for(lambda: server.metrics()["jlora_running"] == 2, server.process)
            answers = [pool.submit(server.post, "/v1/chat/completions", **short) for _ in range(2)]
            wait_for(lambda: server.metrics()["jlora_running"] == 4, server.process)
            os.kill(server.process.pid, signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", server.port), timeout=5)
            for answer in answers:
                assert answer.result().json()["choices"][0]["message"]["content"] == expected
        whole, stream = map(ended, clients)
        assert whole.startswith(b"HTTP/1.1 503") and b"The server ends. Try again later." in whole
        assert stream.startswith(b"HTTP/1.1 200") and b"The server ends. Try again later." in stream
        server.process.wait(30)
        assert server.process.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output


def test_sigint_and_a_port_in_use(strict, small_base, small_adapters):
    options = model_options(small_base, small_adapters)
    done = run_module("jlora.serve", *options, "--port", strict.port)
    assert done.returncode == 2 and re.fullmatch(
        r"error: --host 127\.0\.0\.1 --port \d+ cannot be used: .+\n", done.stderr
    )
    with served(*options) as server:
        client = raw(server, {**LONG, "stream": True, "max_tokens": 5})
        os.kill(server.process.pid, signal.SIGINT)
        server.process.wait(30)
        assert server.process.returncode == 130 and "Traceback" not in server.output
        client.close()
