"""Does real PEFT compute with the written adapter what jlora computed with the trained one?"""

import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jlora.data.chat import encode_prompt, end_tokens, load_tokenizer
from jlora.data.conversation import Reading
from jlora.data.formats import read_conversations
from jlora.errors import UserError
from jlora.generate import Generator
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.families import read_config
from jlora.model.llama import LoraConfig
from jlora.sharding import make_mesh

PROMPTS, NEW_TOKENS = 20, 40
TOLERANCE = 1e-3  # largest allowed difference of a float32 logit
AGREEMENT = 0.9  # share of greedy answers that must be equal; rounding may turn a tie


def verify(record: dict[str, Any], adapter: Adapter, spec: LoraConfig, written: Path) -> str:
    """Compares PEFT on `written` with jlora on the trained adapter: logits of every prompt token, and greedy answers.

    Args:
      record: the run's config.json; its held-out questions (else its training questions) are the prompts.
      adapter, spec: as trained.
      written: the PEFT directory.

    Returns:
      One line with the figures.

    Raises:
      UserError: torch or peft is not installed.
      SystemExit: they disagree, or PEFT warns (exit code 1, with the figures).
    """
    directory = Path(record["base"]["directory"])
    tokenizer = load_tokenizer(directory, record["config"]["chat_template"])
    reading = Reading.of(record["config"])
    rows = read_conversations(record["data"]["questions"], "the run's questions", reading)[:PROMPTS]
    prompts = [encode_prompt(tokenizer, row.messages[:-1] or row.messages) for row in rows]
    theirs, their_answers, said = _peft(directory, written, prompts, end_tokens(directory, tokenizer))
    with jax.default_matmul_precision("highest"):  # float32 means float32 on GPU and TPU too
        ours, our_answers = _jlora(adapter, spec, directory, tokenizer, prompts)
    differences = np.concatenate([np.abs(a - b).ravel() for a, b in zip(ours, theirs, strict=True)])
    largest, median = float(differences.max()), float(np.median(differences))
    equal = sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
    figures = (
        f"PEFT {importlib.metadata.version('peft')} on {written}: {len(prompts)} prompts, float32 logits differ by at "
        f"most {largest:.1e} (median {median:.1e}), {equal} of {len(prompts)} greedy answers of {NEW_TOKENS} tokens "
        "equal"
    )
    if said:
        sys.exit(f"error: PEFT warns when it loads {written}: {'; '.join(said)}")
    if not largest <= TOLERANCE or equal < AGREEMENT * len(prompts):
        demanded = f"at most {TOLERANCE:g}, and {AGREEMENT:.0%} of the answers"
        sys.exit(f"error: the written adapter is not the trained one (allowed: {demanded}). {figures}")
    return f"verified: {figures}"


def _peft(
    directory: Path, written: Path, prompts: list[list[int]], ends: frozenset[int]
) -> tuple[list[np.ndarray], list[list[int]], list[str]]:
    try:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"--verify needs PyTorch and PEFT ({error}): pip install 'jlora[test]'") from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
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
    adapter: Adapter, spec: LoraConfig, directory: Path, tokenizer: Any, prompts: list[list[int]]
) -> tuple[list[np.ndarray], list[list[int]]]:
    graphdef, _, shapes = hf.abstract(read_config(directory), spec, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    base = hf.load_base(directory, shapes, make_mesh(jax.devices()[:1]))
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
