"""What `jlora serve` refuses: OpenAI-style errors, other sites' pages, wrong keys, paths outside its root."""

import json
import re
import shutil
import socket

import httpx
import openai
import pytest
from programs import run_program
from serving import model_options, served

pytestmark = pytest.mark.slow
HI = [{"role": "user", "content": "Hi"}]
ERRORS = [  # changes of a valid body; part of the message
    ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0."),
    ({"temperature": "warm"}, "temperature: Input should be a valid number"),
    ({"top_p": 0}, "top_p: Input should be greater than 0."),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1."),
    ({"max_tokens": 10**9}, "together they can have 2,048 at most. Shorten the prompt or lower max_tokens."),
    ({"max_tokens": 10**30}, "max_tokens: Input should be less than or equal to 1000000000."),
    ({"n": 0}, "n: Input should be greater than or equal to 1."),
    ({"n": 129}, "n: Input should be less than or equal to 128."),
    ({"n": 100}, "n=100: This server gives 64 answers to a request at most."),
    ({"model": 5}, "model: Input should be a valid string."),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": "Hi"}, "messages: Input should be a valid"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role: Input should be 'system', 'developer'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x" * 201]}, "stop: Expected at most 16 strings of at most 200 characters."),
    ({"stop": ["x"] * 17}, "stop: Expected at most 16 strings"),
    ({"seed": 0.5}, "seed: Input should be a valid integer"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs: Input should be less than or equal to 20."),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported. Remove it from the request."),
    ({"tools": [{"type": "function"}]}, "tools is not supported. Remove it from the request."),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported."),
    ({"temprature": 0}, "temprature is not supported. Remove it from the request."),
    ({"messages": [{"role": "user", "content": "very " * 3000}]}, "The prompt has"),
]
PROMPTS = [  # prompts of completions; part of the message
    ([], "prompt"),
    ("", "prompt: Expected at least one token."),
    ([[1, 2]], "prompt"),
    ([-1], "prompt"),
    ([10**30], "prompt"),
    ([4096], "embeds only ids below 4096"),
    (["a", "b"], "prompt"),
    (None, "prompt"),
]
BODIES = [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"model": "base", "messages": NaN}']


def problem(answer, status=400):
    """Checks that an answer is an error in OpenAI's form, and returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"} and found["message"].endswith("."), found
    assert "\n" not in found["message"] and "Traceback" not in found["message"]
    return found["message"]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_wrong_values_are_named(server, changes, message):
    assert message in problem(server.post("/v1/chat/completions", **{"model": "base", "messages": HI, **changes}))


@pytest.mark.parametrize("prompt, message", PROMPTS)
def test_wrong_prompts_are_named(server, prompt, message):
    assert message in problem(server.post("/v1/completions", model="base", prompt=prompt))


def test_bodies_that_are_not_json(server):
    headers = {"Content-Type": "application/json"}
    for body in BODIES:
        problem(server.http.post("/v1/chat/completions", content=body, headers=headers))
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"model": "base", "messages": {json.dumps(HI)}, "temperature": {number}}}'
        assert "temperature" in problem(server.http.post("/v1/chat/completions", content=body, headers=headers))


@pytest.mark.parametrize(
    "model", ["nobody", "", "law:x", "law:nan", "law+", "law:0.5+nobody:0.5", "base+law", "../law"]
)
def test_unknown_models_are_not_found(server, model):
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.chat.completions.create(model=model, messages=HI)
    assert caught.value.code == "model_not_found" and caught.value.type == "invalid_request_error"


def test_unknown_paths_and_methods(server):
    problem(server.http.get("/v1/nothing"), 404)
    problem(server.http.get("/v1/chat/completions"), 405)
    problem(server.post("/health"), 405)
    for path in ("/../etc/passwd", "/%2e%2e/etc/passwd", "/page.html", "/static/../server.py"):
        problem(server.http.get(path), 404)


def test_other_sites_cannot_use_the_server(server):
    """Neither by a name that they let point to this machine, nor by a form or script in a page of theirs."""
    for host, status in {
        "evil.example": 400,
        f"evil.example:{server.port}": 400,
        "": 400,
        "127.0.0.1.evil.example": 400,
        f"localhost:{server.port}": 200,
        f"127.0.0.1:{server.port}": 200,
        "[::1]:80": 200,
    }.items():
        for path in ("/", "/health", "/v1/models", "/metrics"):
            assert server.http.get(path, headers={"Host": host}).status_code == status, (host, path)
    body = json.dumps({"model": "base", "messages": HI})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"):
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/feedback"):
            answer = server.http.post(path, content=body, headers={"Content-Type": kind})
            assert "Content-Type: application/json" in problem(answer, 415)
    assert problem(server.http.post("/v1/chat/completions", content=body), 415)
    asking = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        server.http.options("/v1/chat/completions", headers=asking),
        server.http.post("/v1/chat/completions", json={"model": "x", "messages": HI}, headers=asking),
        server.http.get("/v1/models", headers=asking),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_runs_only_its_own_script(server):
    nonces = set()
    for _ in range(2):
        answer = server.http.get("/")
        policy = answer.headers["content-security-policy"]
        nonces.add(re.search(r"script-src 'nonce-([\w-]{16,})'", policy)[1])
        assert f'nonce="{max(nonces, key=answer.text.count)}"' in answer.text and "__NONCE__" not in answer.text
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe-eval" not in policy
    assert len(nonces) == 2


def test_garbage_on_the_port(server):
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        bytes(range(256)) * 10,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"A" * 200_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(data)
            assert b"HTTP/1.1 400" in client.recv(1000)
    assert server.http.get("/health").status_code == 200


def test_clients_cannot_choose_where_feedback_is_written(server):
    good = {"model": "../x", "messages": HI, "answer": "Yes.", "rating": "up"}
    for extra in ({"file": "/tmp/x"}, {"path": "x"}, {"rating": "sideways"}, {"messages": []}):
        problem(server.post("/feedback", **{**good, **extra}))
    assert server.post("/feedback", **good).status_code == 204


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "../..",
        "..",
        "law/../../..",
        "~",
        "~root",
        "~nobody-such",
        "law\0",
        "",
        ".",
        "nothing",
        "outside",
        "x" * 5000,
        "law/adapter_config.json",
    ],
)
def test_adapters_are_loaded_only_from_below_the_root(server, small_adapters, tmp_path, path):
    shutil.copytree(small_adapters["extra"], tmp_path / "elsewhere")
    link = small_adapters["law"].parent / "outside"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    problem(server.post("/v1/load_lora_adapter", lora_name="new", lora_path=path))
    problem(server.post("/v1/load_lora_adapter", lora_name="new", lora_path=str(tmp_path / "elsewhere")))
    link.unlink()
    assert server.models == [model.id for model in server.openai.models.list()]


@pytest.mark.parametrize(
    "name", ["base", "law", "", "a/b", "../x", "a+b", "a:1", "<b>", "a\0", "a b", "a\n", "x" * 65, 5]
)
def test_names_of_adapters_are_plain(server, name):
    message = problem(server.post("/v1/load_lora_adapter", lora_name=name, lora_path="extra"))
    assert "lora_name" in message


def test_the_api_key(small_base, small_adapters, tmp_path):
    """From a file, then without one; prompts and keys are never printed."""
    (tmp_path / "key").write_text("sesame-file\n")
    options = ["--api_key_file", tmp_path / "key", "--access_log"]
    with served(*model_options(small_base, small_adapters), *options, key="sesame-environment") as server:
        calls = [
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
        ]
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for given in (
                None,
                "Bearer",
                "Bearer sesame-fil",
                "Bearer sesame-environment",
                "Bearer sesäme",
                "Basic x",
            ):
                for method, path in calls:
                    headers = [] if given is None else [(b"authorization", given.encode("latin-1"))]
                    answer = client.request(method, path, headers=headers, json={} if method == "POST" else None)
                    assert "API key is missing or wrong" in problem(answer, 401)
                    assert answer.json()["error"]["type"] == "authentication_error"
            assert client.get("/").status_code == client.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.openai.models.list()
        right = server.openai.with_options(api_key="sesame-file")
        assert [model.id for model in right.models.list()] == server.models
        secret = [{"role": "user", "content": "my-secret-question"}]
        right.chat.completions.create(model="law", messages=secret, max_tokens=2)
        assert '"POST /v1/chat/completions HTTP/1.1" 200' in server.output
        assert not re.search("sesame|secret", server.output)
        problem(server.http.get("/v1/load_lora_adapter"), 405)


def test_a_cache_that_does_not_fit_is_refused(small_base):
    done = run_program("jlora.serve", "--base", small_base, "--port", "0", "--cache_tokens", 10**12)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"--cache_tokens=1000000000000 needs [\d.]+ GiB .* Set it to \d+ or less", done.stderr)
