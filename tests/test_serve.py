"""`jlora serve` with OpenAI's client: answers equal those of jlora itself, whatever else runs at the same time."""

import asyncio
import concurrent.futures
import json
import random
import urllib.request

import numpy as np
import openai
import peft
import pytest
import torch
import transformers
from programs import run_program
from serving import model_options, served

from jlora.serve import loading

pytestmark = pytest.mark.slow
SUM = "law:0.7+style:0.3"
HI = [{"role": "user", "content": "Hi"}]
QUESTIONS = ["Hi", "Must a contract be in writing?", "你好！", "What is " + "very " * 80 + "long?"]


@pytest.fixture(scope="module")
def loaded(small_base, small_adapters):
    """The same model in this process."""
    return loading.load_model(str(small_base), {name: small_adapters[name] for name in ("law", "style")})


@pytest.fixture(scope="module")
def theirs(small_base, small_adapters):
    """The model with the adapter law in PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, small_adapters["law"]).eval()


def answers_of(loaded, count):
    """(model, question) -> the greedy answer of jlora itself."""
    words = {"base": "", "law": "law", "style": "style", SUM: "law=0.7 style=0.3"}
    return {
        (name, question): loaded.answer(question, use, max_new_tokens=count)
        for name, use in words.items()
        for question in QUESTIONS
    }


def test_greedy_answers_equal_those_of_jlora_under_any_load(server, loaded):
    expected = answers_of(loaded, 12)
    assert len(set(expected.values())) > 8  # adapters and questions matter
    rng = random.Random(0)
    asked = [*expected]
    rng.shuffle(asked)

    def ask(number):
        model, question = asked[number]
        noise = {"temperature": 2.0, "seed": number, "n": rng.randint(1, 3), "max_tokens": rng.randint(1, 30)}
        server.chat(question, model, **noise)
        return server.text(question, model, max_tokens=12).strip()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(ask, range(len(asked))))
    assert got == [expected[pair] for pair in asked]
    assert server.idle() and server.metrics()["jlora_free_cache_tokens"] == 16384


def test_the_program_generate_answers_the_same(server, small_base, small_adapters):
    done = run_program(
        *("jlora.generate", "--base", small_base, "--adapter", f"law={small_adapters['law']}"),
        *("--prompt", QUESTIONS[1], "--max_new_tokens", 12),
    )
    assert done.stdout == server.text(QUESTIONS[1], "law", max_tokens=12) + "\n"


def test_streams_join_to_the_whole_answer(server):
    options = {"messages": HI, "max_tokens": 24, "temperature": 1.5, "seed": 5}
    for model in ("base", "law", "style", SUM):
        whole = server.openai.chat.completions.create(model=model, **options)
        pieces = list(server.openai.chat.completions.create(model=model, stream=True, **options))
        assert pieces[0].choices[0].delta.role == "assistant" and pieces[0].choices[0].delta.content == ""
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
        assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert {piece.id for piece in pieces} == {pieces[0].id} != {whole.id} and whole.model == model
        assert whole.usage.completion_tokens == 24
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    last = list(
        server.openai.chat.completions.create(
            model="law", stream=True, stream_options={"include_usage": True}, **options
        )
    )[-1]
    assert last.choices == [] and last.usage.completion_tokens == 24 and last.usage.prompt_tokens > 10


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            options = {"messages": HI, "temperature": 0, "max_tokens": 10}
            calls = [client.chat.completions.create(model=model, **options) for model in ("law", "style")]
            whole = [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]
            stream = await client.chat.completions.create(model="law", stream=True, **options)
            return [*whole, "".join([piece.choices[0].delta.content or "" async for piece in stream])]

    law, style, streamed = asyncio.run(ask())
    assert law == streamed == server.text("Hi", "law", max_tokens=10)
    assert style == server.text("Hi", "style", max_tokens=10) != law


def test_n_answers_equal_requests_with_the_next_seeds(server):
    options = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 8}
    together = server.chat("Hi", "law", n=3, seed=7, **options).json()
    texts = [choice["message"]["content"] for choice in together["choices"]]
    assert texts == [server.text("Hi", "law", seed=seed, **options) for seed in (7, 8, 9)]
    assert len(set(texts)) == 3 and [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert together["usage"]["completion_tokens"] == 24
    joined = ["", "", ""]
    stream = server.openai.chat.completions.create(model="law", messages=HI, n=3, seed=7, stream=True, **options)
    for piece in stream:
        joined[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert joined == texts
    unseeded = {server.text("Hi", "law", **options) for _ in range(3)}
    assert len(unseeded) > 1


def test_log_probabilities_are_those_of_a_forward_pass(server, loaded, theirs):
    options = {"model": "law", "messages": HI, "max_tokens": 6, "temperature": 1.0, "seed": 1}
    answer = server.openai.chat.completions.create(logprobs=True, top_logprobs=4, **options).choices[0]
    tokenizer = loaded.generator.tokenizer
    prompt = tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=True)["input_ids"]
    said = server.openai.completions.create(
        model="law", prompt=prompt, max_tokens=6, temperature=1.0, seed=1, logprobs=20
    ).choices[0]
    assert said.text == answer.message.content and len(answer.logprobs.content) == 6
    ids = list(prompt)
    for position, entry in enumerate(answer.logprobs.content):
        with torch.no_grad():
            logs = torch.log_softmax(theirs(torch.tensor([ids])).logits[0, -1], dim=-1)
        highest = torch.topk(logs, 4)
        assert np.allclose([top.logprob for top in entry.top_logprobs], highest.values, atol=1e-3)
        assert [top.token for top in entry.top_logprobs] == [tokenizer.decode([i]) for i in highest.indices]
        matching = [i for i in range(len(logs)) if abs(logs[i] - entry.logprob) < 1e-3]
        ids.append(next(i for i in matching if tokenizer.decode([i]) == entry.token))
        assert said.logprobs.token_logprobs[position] == pytest.approx(entry.logprob, abs=1e-5)
        assert len(said.logprobs.top_logprobs[position]) in range(15, 21)  # tokens may have the same text
    streamed = [
        entry
        for piece in server.openai.chat.completions.create(logprobs=True, stream=True, **options)
        for entry in (piece.choices[0].logprobs.content if piece.choices[0].logprobs else [])
    ]
    assert [e.token for e in streamed] == [e.token for e in answer.logprobs.content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in answer.logprobs.content], abs=1e-5)


def test_stop_strings_end_answers_and_are_never_shown(server):
    options = {"temperature": 1.5, "seed": 3, "max_tokens": 24}
    text = server.text("Hi", "law", **options)
    for start, size in ((5, 1), (9, 7), (len(text) - 3, 3)):  # the second covers several tokens
        stop = text[start : start + size]
        expected = text[: text.index(stop)]
        whole = server.chat("Hi", "law", stop=["nowhere", stop], **options).json()
        assert whole["choices"][0]["message"]["content"] == expected
        assert whole["choices"][0]["finish_reason"] == "stop"
        shown = ""
        for piece in server.openai.chat.completions.create(model="law", messages=HI, stream=True, stop=stop, **options):
            shown += piece.choices[0].delta.content or ""
            assert expected.startswith(shown)
        assert shown == expected and piece.choices[0].finish_reason == "stop"
        counts = {server.chat("Hi", "law", stop=stop, **options).json()["usage"]["completion_tokens"] for _ in "123"}
        assert len(counts) == 1  # it does not depend on when the server notices
    assert server.text("Hi", "law", stop=[], **options) == server.text("Hi", "law", stop=None, **options) == text


def test_completions_continue_texts_and_token_ids(server, loaded):
    create = server.openai.completions.create
    ids = loaded.generator.tokenizer("The law says")["input_ids"]
    said = [create(model="law", prompt=prompt, temperature=0) for prompt in ("The law says", ["The law says"], ids)]
    assert len({answer.choices[0].text for answer in said}) == 1
    assert said[0].usage.completion_tokens == 16 and said[0].choices[0].finish_reason == "length"
    tokens = list(loaded.generator.generate_tokens(loaded.adapters.select(["law"]), ids, 16))
    assert said[0].choices[0].text == loaded.generator.tokenizer.decode(tokens, skip_special_tokens=True)
    stream = create(model="law", prompt=ids, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == said[0].choices[0].text


def test_messages_in_parts_and_with_a_system_turn(server):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    for role in ("system", "developer"):
        turns = [{"role": role, "content": "Be brief."}, {"role": "user", "content": parts}]
        body = {"model": "law", "messages": turns, "temperature": 0, "max_completion_tokens": 6, "user": "someone"}
        got = server.post("/v1/chat/completions", **body)
        said = got.json()["choices"][0]["message"]["content"]
        assert (
            said
            == server.post(
                "/v1/chat/completions",
                **{**body, "messages": [{"role": "system", "content": "Be brief."}, *HI]},
            ).json()["choices"][0]["message"]["content"]
        )


def test_a_prompt_that_was_computed_before_is_reused(server):
    question = "Tell me all about the termination of labor contracts, please. " * 4
    first, second = (server.chat(question, "law", max_tokens=4).json() for _ in range(2))
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 16 <= reused < second["usage"]["prompt_tokens"] and reused % 16 == 0
    other = server.chat(question, "style", max_tokens=4).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert other < reused - 16  # keys and values depend on the adapter


def test_models_health_and_metrics(server):
    assert [model.id for model in server.openai.models.list()] == ["law", "style", "base"] == server.models
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.load(answer) == {"status": "ok", "feedback": True}
    before = server.metrics()
    server.chat("Hi", "law", max_tokens=5)
    after = server.metrics()
    assert after["jlora_requests_total"] - before.get("jlora_requests_total", 0) == 1
    assert after["jlora_answer_tokens_total"] - before["jlora_answer_tokens_total"] == 5
    assert after["jlora_first_token_seconds_count"] - before["jlora_first_token_seconds_count"] == 1


def test_output_rules_apply_to_whole_and_streamed_answers(small_base, small_adapters, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- replace: '[a-z0-9]'\n  with: '~'\n- refuse: 'went'\n  say: I do not know.\n")
    with served(*model_options(small_base, small_adapters), "--output_rules", rules) as server:
        assert "went" not in server.text("Hi", max_tokens=4) and server.text("Hi", max_tokens=4) == "I do not know."
        for seed in range(3):
            options = {"model": "law", "messages": HI, "temperature": 1.5, "seed": seed, "max_tokens": 20}
            whole = server.openai.chat.completions.create(**options).choices[0].message.content
            stream = server.openai.chat.completions.create(stream=True, **options)
            assert whole == "".join(piece.choices[0].delta.content or "" for piece in stream)
            assert whole == "I do not know." or ("~" in whole and not any("a" <= letter <= "z" for letter in whole))
        with pytest.raises(openai.BadRequestError, match="logprobs: Not available, because this server applies output"):
            server.openai.chat.completions.create(logprobs=True, **options)
