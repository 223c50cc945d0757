"""The engine: each answer is the same as alone, whatever requests come; blocks are shared and given back."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_adapters import SPECS, Alone

from jlora.adapters import combining
from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import write_adapter
from jlora.models import hf_loader, kv_cache
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.serve import block_pool, loading
from jlora.serve import engine as engine_module
from jlora.serve.engine import Request
from jlora.serve.sampling import Sampling

MIXTURES = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.7, -0.3, 1.0)]
PROMPT = np.random.RandomState(0).randint(20, 4096, 50).tolist()
BLOCK, SPAN = 16, 8
PLACES, TOKENS = 4, 512  # of the engine that most tests share


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Makes blocks so small that short prompts fill several."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kv_cache, block_pool, engine_module):
            patch.setattr(module, "BLOCK", BLOCK)
        for module in (kv_cache, engine_module):
            patch.setattr(module, "SPAN", SPAN)
        yield


@pytest.fixture(scope="module")
def generator(small, places):
    """The small model with three adapters side by side."""
    return loading.load_model(str(small), {name: places[name] for name in SPECS}).generator


@pytest.fixture(scope="module")
def shared(generator):
    return generator.make_engine(PLACES, TOKENS)


@pytest.fixture
def engine(shared):
    """An engine that knows no tokens; after the test, its places and blocks are free again."""
    shared.pool.forget()
    yield shared
    assert shared.pool.free == shared.pool.size and not shared.busy


def ask(engine, prompt, mixture, count=8, **options):
    """Returns a request after it has been answered."""
    request = Request(prompt, mixture, count, **options)
    engine.submit(request)
    engine.run()
    return request


def ids(request):
    return [token.id for token in request.answer]


def random_requests(seed):
    """Requests of which many start alike, some of them in the middle of a block."""
    random = np.random.RandomState(seed)
    for number in range(12):
        prompt = PROMPT[: random.choice([0, 16, 40])] + random.randint(20, 4096, random.randint(1, 60)).tolist()
        temperature, top_p = [(0.0, 1.0), (1.5, 1.0), (1.5, 0.8)][random.randint(3)]
        mixture = MIXTURES[random.randint(len(MIXTURES))]
        yield Request(prompt, mixture, int(random.randint(1, 20)), Sampling(temperature, top_p, number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_the_same_whatever_others_join_leave_or_are_cancelled(engine, seed):
    alone = []
    for request in random_requests(seed):
        engine.pool.forget()
        alone.append(
            ids(ask(engine, request.prompt, request.mixture, request.max_new_tokens, sampling=request.sampling))
        )
    engine.pool.forget()
    random, coming, most = np.random.RandomState(seed), list(random_requests(seed)), 0
    requests = list(coming)
    while coming or engine.busy:
        for _ in range(min(len(coming), random.poisson(0.6))):
            engine.submit(coming.pop(0))
        if engine.busy and random.rand() < 0.15:
            engine.cancel(random.choice(engine.requests()))
        engine.step()
        most = max(most, len(engine.running))
        assert len(engine.running) <= PLACES
    for request, answer in zip(requests, alone, strict=True):
        assert ids(request) == (answer[: len(request.answer)] if request.finish == "cancelled" else answer)
    assert most == PLACES and any(request.reused for request in requests)
    assert {request.finish for request in requests} >= {"length", "cancelled"}


def test_a_request_that_overflows_does_not_reach_the_others(engine):
    def logits():
        engine.pool.forget()
        return engine.next_token_logits(Request(PROMPT, MIXTURES[1], 1))

    want = logits()
    broken = (1e38, 0.0, 0.0)
    assert np.isnan(engine.next_token_logits(Request(PROMPT, broken, 1))).all()
    ask(engine, (PROMPT * 10)[:490], broken)  # NaN in almost all blocks
    assert np.array_equal(logits(), want)
    one, other = Request(PROMPT[:30], broken, 8), Request(PROMPT[:30], MIXTURES[1], 8)
    engine.submit(one)
    engine.submit(other)
    engine.run()
    engine.pool.forget()
    assert ids(other) == ids(ask(engine, PROMPT[:30], MIXTURES[1])) != ids(one)


def test_a_request_with_the_same_start_reuses_its_blocks(engine):
    first = ask(engine, PROMPT, MIXTURES[1], 30)
    again = ask(engine, PROMPT, MIXTURES[1], 30)
    assert (first.reused, again.reused) == (0, 48) and ids(again) == ids(first)
    assert ask(engine, PROMPT[:48], MIXTURES[1]).reused == 32  # the last token is always computed
    assert ask(engine, [7, *PROMPT], MIXTURES[1]).reused == 0
    follow_up = [*first.tokens, *PROMPT[:20]]
    second = ask(engine, follow_up, MIXTURES[1])
    assert second.reused == first.computed // BLOCK * BLOCK > len(PROMPT)
    engine.pool.forget()
    assert ids(second) == ids(ask(engine, follow_up, MIXTURES[1]))


def test_requests_with_another_mixture_share_no_blocks(engine):
    for mixture in MIXTURES:
        assert ask(engine, PROMPT, mixture).reused == 0
    for mixture in MIXTURES:
        assert ask(engine, PROMPT, mixture).reused == 48
    engine.replace_adapter(engine.adapter)
    assert ask(engine, PROMPT, MIXTURES[1]).reused == 0


@pytest.mark.slow
@pytest.mark.parametrize("names", [[*SPECS], ["dora"], []], ids=["side by side", "own form", "no adapter"])
def test_nothing_compiles_after_compile_all(small, places, names, caplog):
    def compilations(act):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.DEBUG):
            act()
        return [record.message for record in caplog.records if "ompil" in record.message]

    def answer_all():
        for request in requests:
            engine.submit(dataclasses.replace(request, mixture=request.mixture[: len(none)], answer=[]))
        engine.run()

    generator, adapters = loading.load_model(str(small), {name: places[name] for name in names})
    none = adapters.none
    requests = [
        Request(PROMPT * 6, (0.0, 0.0, 0.0), 3),
        *(Request(PROMPT[:10], (1.0, 0.0, 0.0), n, Sampling(n % 2, 0.9), logprobs=n > 2) for n in range(1, 5)),
    ]
    engine = generator.make_engine(3, TOKENS)
    assert compilations(engine.compile_all)
    assert not compilations(answer_all)
    engine.replace_adapter(jax.tree.map(np.asarray, engine.adapter))
    assert not compilations(answer_all)
    engine = generator.make_engine(3, TOKENS)
    assert compilations(answer_all)  # the negative control


def test_requests_wait_while_the_cache_is_full(engine):
    """And the first one of the queue comes first."""
    requests = [Request([n + 20, *PROMPT, *PROMPT], MIXTURES[n % 4], 60) for n in range(6)]  # 11 blocks of 32 each
    for request in requests:
        engine.submit(request)
    finished, together = [], 0
    while engine.busy:
        engine.step()
        together = max(together, len(engine.running))
        assert engine.pool.free == engine.pool.size - sum(len(request.blocks) for request in requests)
        finished += [request for request in requests if request.finish and request not in finished]
    assert together == 2 and finished == requests
    assert all(request.finish in ("length", "stop") for request in requests)


def test_log_probabilities_are_those_of_the_forward_pass(small, places, engine):
    """Temperature and top_p only choose among them."""
    for sampling in (Sampling(), Sampling(2.0, 0.9, 5)):
        request = ask(engine, PROMPT, MIXTURES[1], 12, sampling=sampling, logprobs=True)
        logits = Alone(small, places["law"], 64).logits(request.tokens)[len(PROMPT) - 1 : -1]
        for token, want in zip(request.answer, np.asarray(jax.nn.log_softmax(logits)), strict=True):
            found, values = zip(*token.alternatives, strict=True)
            assert abs(token.logprob - want[token.id]) < 1e-4
            assert np.abs(np.array(values) - np.sort(want)[:-21:-1]).max() < 1e-4
            assert np.abs(want[list(found)] - values).max() < 1e-4 and len(set(found)) == 20
            assert list(values) == sorted(values, reverse=True)
            assert sampling.temperature or found[0] == token.id
    assert ask(engine, PROMPT, MIXTURES[1]).answer[0][1:] == (None, ())


@pytest.mark.slow
def test_a_sum_beside_others_equals_the_added_adapter_alone(small, places, generator, engine, tmp_path):
    found = loading.read_complete({name: places[name] for name in SPECS}, small)
    adapter, spec = combining.combine(list(found.values()), MIXTURES[3])
    write_adapter(adapter, spec, peft_config(spec, str(small), None, tied=True), "", tmp_path / "sum")
    requests = [Request(PROMPT, mixture, 10) for mixture in MIXTURES]
    for request in requests:
        engine.submit(request)
    engine.run()
    directories = (None, places["law"], places["style"], tmp_path / "sum")
    want = [Alone(small, place, 64).answer(PROMPT, 10, generator.ends) for place in directories]
    assert [ids(request) for request in requests] == want
    assert len(set(map(tuple, want))) == 4


@pytest.mark.slow
def test_an_adapter_in_its_own_form_answers_beside_the_base_model(small, places):
    generator = loading.load_model(str(small), {"dora": places["dora"]}).generator
    engine = generator.make_engine(PLACES, TOKENS)
    requests = [Request(PROMPT[n:], (float(n % 2),), 8) for n in range(4)]
    for request in requests:
        engine.submit(request)
    engine.run()
    models = [Alone(small, place, 64) for place in (None, places["dora"])]
    want = [models[n % 2].answer(PROMPT[n:], 8, generator.ends) for n in range(4)]
    assert [ids(request) for request in requests] == want
    assert want[1] != models[0].answer(PROMPT[1:], 8, generator.ends)


@pytest.mark.slow
def test_answers_longer_than_a_sliding_window(small, tmp_path):
    """Equal the forward passes of whole sequences, over several spans of blocks."""
    windowed, changes = tmp_path / "windowed", {"model_type": "mistral", "sliding_window": 20}
    shutil.copytree(small, windowed)
    config = json.loads((small / "config.json").read_text())
    (windowed / "config.json").write_text(json.dumps({**config, **changes, "architectures": ["MistralForCausalLM"]}))
    assert read_config(windowed).sliding_window == 20
    generator = loading.load_model(str(windowed)).generator
    prompt = PROMPT + PROMPT  # shorter than a span, the answer ends in the next one
    answer = list(generator.generate_tokens((0.0,), prompt, 40))
    assert len(answer) > SPAN * BLOCK - len(prompt)
    assert answer == Alone(windowed, None, 192).answer(prompt, 40, generator.ends)
    assert answer != Alone(small, None, 192).answer(prompt, 40, generator.ends)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lower_precision(small, places, generator, dtype):
    """The cache has this dtype, logits are close to those in float32, and rows do not depend on each other."""
    compute = dataclasses.replace(FLOAT32_COMPUTE, param_dtype=dtype, compute_dtype=dtype)
    base = hf_loader.load_base_alone(small, compute)
    forms = loading.read_complete({name: places[name] for name in SPECS}, small)
    low = loading.make_generator(small, generator.tokenizer, base, forms, compute)
    close = low.next_token_logits(MIXTURES, [PROMPT] * 4) - generator.next_token_logits(MIXTURES, [PROMPT] * 4)
    assert 1e-5 < np.abs(close).max() < (0.3 if dtype == jnp.bfloat16 else 0.04)
    assert low._engine._cache.k.dtype == dtype
    answers = low.generate_batch(MIXTURES, [PROMPT] * 4, 8)
    assert answers == low.generate_batch(MIXTURES, [PROMPT] * 4, 8) and all(answers)


@pytest.mark.slow
def test_a_mesh_gives_the_same_answers(tiny):
    """Four devices: two share the heads and the cache, two share each weight."""
    alone, shared = (loading.load_model(str(tiny), mesh=mesh) for mesh in (None, {"tensor": 2, "fsdp": 2}))
    prompts, mixtures = [PROMPT[:5], PROMPT, PROMPT * 3], [(0.0,)] * 3
    differences = [model.generator.next_token_logits(mixtures, prompts) for model in (alone, shared)]
    assert np.abs(differences[0] - differences[1]).max() < 1e-4
    answers = [model.generator.generate_batch(mixtures, prompts, 12) for model in (alone, shared)]
    assert answers[0] == answers[1] and all(answers[0])
    cache = shared.generator._engine._cache.k
    assert len(cache.devices()) == 4 and cache.addressable_shards[0].data.shape[2] == 1  # of two kv heads
