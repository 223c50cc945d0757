"""Does real PEFT compute with the written adapter what jlora computed with the trained one?"""

import dataclasses
import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import jlora
from jlora.adapters.peft_config import read_spec
from jlora.adapters.peft_io import read_adapter
from jlora.adapters.spec import NOTHING, AdapterSpec
from jlora.adapters.tree import Adapter
from jlora.data.chat import encode_prompt, end_tokens, load_tokenizer
from jlora.data.conversation import Reading
from jlora.data.readers.files import read_conversations
from jlora.distributed.sharding import make_mesh
from jlora.models import hf_loader
from jlora.models.compute import FLOAT32, Compute
from jlora.models.families import read_config
from jlora.serve.generator import Generator

PROMPTS, NEW_TOKENS = 20, 40
TOLERANCE = 1e-3  # largest allowed difference of a float32 logit
AGREEMENT = 0.9  # share of greedy answers that must be equal; rounding may turn a tie


@dataclasses.dataclass(frozen=True)
class Parity:
    """How well the written adapter computes what was trained."""

    checked_with: str
    weaker: bool  # read back by jlora, as PyTorch and PEFT are not installed
    prompts: list[str]
    largest_logit_difference: float
    median_logit_difference: float
    equal_greedy_answers: int
    tokens_an_answer: int
    versions: dict[str, str]
    sentence: str


def verify(record: dict[str, Any], adapter: Adapter, spec: AdapterSpec, written: Path) -> Parity:
    """Compares PEFT on `written` with jlora on the trained adapter: logits of every prompt token, and greedy answers.

    Where PyTorch or PEFT is not installed, jlora reads `written` itself: a weaker check, which says so.

    Args:
      record: the run's config.json; its held-out questions (else its training questions) are the prompts.
      adapter, spec: as trained.
      written: the PEFT directory.

    Raises:
      UserError: `written` cannot be read.
      SystemExit: they disagree, or PEFT warns (exit code 1, with the figures).
    """
    directory = Path(record["base"]["directory"])
    tokenizer = load_tokenizer(directory, record["config"]["chat_template"])
    reading = Reading.of(record["config"])
    rows = read_conversations(record["data"]["questions"], "the run's questions", reading)[:PROMPTS]
    asked = [row.messages[:-1] or row.messages for row in rows]
    prompts = [encode_prompt(tokenizer, messages) for messages in asked]
    compute = dataclasses.replace(FLOAT32, quantize=record["config"]["quantize_base"])
    weaker = not all(map(importlib.util.find_spec, ("torch", "peft")))
    said: list[str] = []
    if weaker:
        theirs, their_answers = _read_back(written, directory, tokenizer, prompts, compute)
    else:
        theirs, their_answers, said = _peft(directory, written, prompts, end_tokens(directory, tokenizer), compute)
    if said:
        sys.exit(f"error: PEFT warns when it loads {written}: {'; '.join(said)}")
    ours, our_answers = _jlora(adapter, spec, directory, tokenizer, prompts, compute)
    differences = np.concatenate([np.abs(a - b).ravel() for a, b in zip(ours, theirs, strict=True)])
    largest, median = float(differences.max()), float(np.median(differences))
    equal = sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
    packages = ("jax", "flax", "transformers") + (() if weaker else ("torch", "peft"))
    versions = {"jlora": jlora.__version__, **{name: importlib.metadata.version(name) for name in packages}}
    own = "jlora's own reader (a weaker check: PyTorch and PEFT are not installed)"
    checked_with = own if weaker else f"PEFT {versions['peft']}"
    base = "" if compute.quantize == "none" else f" and the base in {compute.quantize}"
    figures = (
        f"{checked_with} on {written}{base}: {len(prompts)} prompts, float32 logits differ by at "
        f"most {largest:.1e} (median {median:.1e}), {equal} of {len(prompts)} greedy answers of {NEW_TOKENS} tokens "
        "equal"
    )
    if not largest <= TOLERANCE or equal < AGREEMENT * len(prompts):
        demanded = f"at most {TOLERANCE:g}, and {AGREEMENT:.0%} of the answers"
        sys.exit(f"error: the written adapter is not the trained one (allowed: {demanded}). {figures}")
    questions = [messages[-1].content for messages in asked]
    sentence = f"verified: {figures}"
    return Parity(checked_with, weaker, questions, largest, median, equal, NEW_TOKENS, versions, sentence)


def _base(directory: Path, compute: Compute) -> dict[str, Any]:
    _, _, shapes = hf_loader.abstract(read_config(directory), NOTHING, compute)
    return hf_loader.load_base(directory, shapes, make_mesh(jax.devices()[:1]))


def _read_back(
    written: Path, directory: Path, tokenizer: Any, prompts: list[list[int]], compute: Compute
) -> tuple[list[np.ndarray], list[list[int]]]:
    config = read_config(directory)
    spec = read_spec(written, config.num_hidden_layers)
    _, shapes, _ = hf_loader.abstract(config, spec, FLOAT32)
    adapter = read_adapter(written, spec, shapes, tied=config.tie_word_embeddings)
    return _jlora(adapter, spec, directory, tokenizer, prompts, compute)


def _peft(
    directory: Path, written: Path, prompts: list[list[int]], ends: frozenset[int], compute: Compute
) -> tuple[list[np.ndarray], list[list[int]], list[str]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if compute.quantize != "none":  # the same weights, of which the codes stand for others than the files hold
            with torch.no_grad():
                for name, values in hf_loader.dense(_base(directory, compute)):
                    base.get_parameter(name).copy_(torch.tensor(values))
        model = PeftModel.from_pretrained(base, written).eval()
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    logits, answers = [], []
    with torch.no_grad():
        for prompt in tqdm(prompts, desc="PEFT", unit="prompt", disable=None):
            ids = torch.tensor([prompt])
            logits.append(model(ids).logits[0].numpy())
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
            )[0, len(prompt) :].tolist()
            answers.append([token for token in new if token not in ends])
    return logits, answers, said


def _jlora(
    adapter: Adapter, spec: AdapterSpec, directory: Path, tokenizer: Any, prompts: list[list[int]], compute: Compute
) -> tuple[list[np.ndarray], list[list[int]]]:
    with jax.default_matmul_precision("highest"):  # float32 means float32 on GPU and TPU too
        graphdef, _, _ = hf_loader.abstract(read_config(directory), spec, compute)
        base = _base(directory, compute)
        generator = Generator(directory, tokenizer, graphdef, base, jnp.float32)

        @jax.jit
        def forward(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, adapter, base)
            hidden, _ = model(ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
            return model.logits(hidden[0])

        longest = max(map(len, prompts))  # one program: what comes after a token does not change its logits
        logits = [
            np.asarray(forward(adapter, base, jnp.array([prompt + [0] * (longest - len(prompt))])))[: len(prompt)]
            for prompt in prompts
        ]
        answers = [
            list(generator.tokens(adapter, prompt, NEW_TOKENS))
            for prompt in tqdm(prompts, desc="jlora", unit="prompt", disable=None)
        ]
        return logits, answers
