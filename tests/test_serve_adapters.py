"""Adapters that are loaded and unloaded while `jlora serve` answers, with vLLM's requests."""

import concurrent.futures
import json

import pytest
from programs import wait_for

from jlora.serve import loading

pytestmark = pytest.mark.slow
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
QUESTION = "Must it be in writing?"


@pytest.fixture(scope="module")
def expected(small_base, small_adapters):
    """Name -> jlora's own answer with each adapter."""
    names = ("law", "extra", "more")
    model = loading.load_model(str(small_base), {name: small_adapters[name] for name in names})
    return {name: model.answer(QUESTION, name, max_new_tokens=10) for name in names}


def answer(server, model):
    """Returns a served answer, or its status if there is none."""
    got = server.chat(QUESTION, model, max_tokens=10)
    return got.json()["choices"][0]["message"]["content"].strip() if got.status_code == 200 else got.status_code


def load(server, name, path):
    """Loads an adapter."""
    got = server.post(LOAD, lora_name=name, lora_path=str(path))
    assert got.status_code == 200, got.text
    assert name in [model.id for model in server.openai.models.list()]


def unload(server, name):
    """Unloads an adapter."""
    assert server.post(UNLOAD, lora_name=name).status_code == 200


def test_adapters_come_and_go(server, small_adapters, expected):
    assert len(set(expected.values())) == 3 and answer(server, "more") == 404
    load(server, "more", "more")  # relative to the root
    load(server, "another", small_adapters["extra"])
    assert (answer(server, "more"), answer(server, "another")) == (expected["more"], expected["extra"])
    assert answer(server, "law") == expected["law"]
    full = server.post(LOAD, lora_name="fifth", lora_path="extra")
    assert full.status_code == 400 and "4 adapters are loaded, as many as --max_adapters allows" in full.text
    unload(server, "more")
    assert answer(server, "more") == answer(server, "more:0.5+law:0.5") == 404
    again = server.post(UNLOAD, lora_name="more")
    assert again.status_code == 400 and "No adapter has this name" in again.text
    load(server, "fifth", "extra")  # the place, and what the cache knows of it, are another adapter's now
    assert answer(server, "fifth") == answer(server, "another") == expected["extra"]
    unload(server, "fifth")
    unload(server, "another")


def test_an_adapter_that_is_unloaded_answers_running_requests_to_their_end(server, expected):
    load(server, "more", "more")
    options = {"temperature": 0, "max_tokens": 400}
    whole = server.text(QUESTION, "more", **options)
    turns = [{"role": "user", "content": QUESTION}]
    stream = server.openai.chat.completions.create(model="more", messages=turns, stream=True, **options)
    pieces = [next(stream), next(stream)]
    unload(server, "more")
    assert answer(server, "more") == 404
    load(server, "extra", "extra")
    refused = server.post(LOAD, lora_name="second", lora_path="extra")  # the running request still has the place
    assert server.metrics()["jlora_running"] == 1 and refused.status_code == 400
    assert answer(server, "extra") == expected["extra"]
    pieces += list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    wait_for(server.idle, server.process)
    unload(server, "extra")
    load(server, "third", "extra")
    load(server, "fourth", "more")
    assert (answer(server, "third"), answer(server, "fourth")) == (expected["extra"], expected["more"])
    unload(server, "third")
    unload(server, "fourth")


def test_adapters_change_under_load(server, expected):
    """Names that are loaded and unloaded by two clients at a time; no answer is another adapter's."""

    def change(name):
        for _ in range(6):
            load(server, name, name)
            assert answer(server, name) == expected[name]
            unload(server, name)

    def ask(_):
        return {answer(server, "law") for _ in range(6)}

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        changes, asked = pool.map(change, ("extra", "more")), pool.map(ask, range(3))
        assert list(changes) == [None, None]
        assert all(said == {expected["law"]} for said in asked)
    assert [model.id for model in server.openai.models.list()] == server.models


def test_one_name_is_loaded_once(server):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: server.post(LOAD, lora_name="extra", lora_path="extra").status_code, range(4)))
    assert sorted(done) == [200, 400, 400, 400]
    unload(server, "extra")
    load(server, "one", "more")
    load(server, "two", "more")  # both places are free again
    unload(server, "one")
    unload(server, "two")


def test_adapters_that_do_not_fit_are_refused(server, small_adapters):
    root = small_adapters["law"].parent
    config = json.loads((root / "extra/adapter_config.json").read_text())
    (root / "wrong").mkdir(exist_ok=True)
    files = {
        "not JSON": "{",
        "a list": "[]",
        "another kind": json.dumps({**config, "peft_type": "PREFIX_TUNING"}),
        "DoRA": json.dumps({**config, "use_dora": True}),
        "a wrong rank": json.dumps({**config, "r": 3}),
    }
    for weights in (b"", b"\0" * 100, (root / "extra/adapter_model.safetensors").read_bytes()[:-10]):
        (root / "wrong/adapter_config.json").write_text(json.dumps(config))
        (root / "wrong/adapter_model.safetensors").write_bytes(weights)
        assert server.post(LOAD, lora_name="wrong", lora_path="wrong").status_code == 400, weights[:10]
    (root / "wrong/adapter_model.safetensors").write_bytes((root / "extra/adapter_model.safetensors").read_bytes())
    for what, text in files.items():
        (root / "wrong/adapter_config.json").write_text(text)
        assert server.post(LOAD, lora_name="wrong", lora_path="wrong").status_code == 400, what
    assert "wrong" not in [model.id for model in server.openai.models.list()]
