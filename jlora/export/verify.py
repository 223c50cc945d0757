"""Verifies that PEFT computes the same with an exported adapter as jlora with the trained one."""

import dataclasses
import importlib.metadata
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import jlora
from jlora.adapters.combining import AdapterSet
from jlora.adapters.params import Adapter
from jlora.adapters.peft_config import read_spec
from jlora.adapters.peft_io import read_adapter
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import VerificationError
from jlora.common.plural import plural
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import ReadOptions
from jlora.data.readers import splits
from jlora.data.readers.files import read_conversations
from jlora.data.tokenizer import TEMPLATE_KEYS, end_tokens, load_tokenizer
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE, ComputeSettings
from jlora.models.families import read_config
from jlora.serve.generator import Generator

# PEFT's warnings about merging an adapter of token tables or biases, which do not concern a loaded one.
MERGING = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "`lora_bias=True` was passed",
)
PROMPTS, NEW_TOKENS = 20, 40
TOLERANCE = 1e-3  # largest allowed difference of float32 logits
AGREEMENT = 0.9  # share of greedy answers that must be equal; rounding may break a tie the other way


@dataclasses.dataclass(frozen=True)
class Parity:
    """How closely an exported adapter computes what was trained."""

    checked_with: str
    weaker: bool  # read back by jlora, because PyTorch or PEFT is not installed: a weaker check
    prompts: list[str]
    largest_logit_difference: float
    median_logit_difference: float
    equal_greedy_answers: int
    tokens_an_answer: int
    versions: dict[str, str]
    sentence: str


def verify(record: dict[str, Any], adapter: Adapter, spec: AdapterSpec, exported: Path) -> Parity:
    """Compares PEFT on `exported` with jlora on the trained adapter: logits of all prompt tokens, and greedy answers.

    If PyTorch or PEFT is not installed, jlora reads `exported` itself: a weaker check, which the report mentions.

    Args:
      record: the run's config.json; its held-out questions, or else its training questions, are the prompts.
      adapter, spec: the trained adapter.
      exported: the PEFT directory.

    Raises:
      UserError: `exported` cannot be read.
      VerificationError: they disagree, or PEFT warns.
    """
    directory = Path(record["base"]["directory"])
    tokenizer = load_tokenizer(directory, *(record["config"][key] for key in TEMPLATE_KEYS))
    questions, prompts = read_prompts(record, tokenizer, PROMPTS)
    compute = dataclasses.replace(FLOAT32_COMPUTE, quantize=record["config"]["quantize_base"])
    weaker = not all(map(importlib.util.find_spec, ("torch", "peft")))
    peft_warnings: list[str] = []
    if weaker:
        theirs, their_answers = _read_back(exported, directory, tokenizer, prompts, compute)
    else:
        ends = end_tokens(directory, tokenizer)
        theirs, their_answers, peft_warnings = _peft(directory, exported, prompts, ends, compute, spec.vocabulary)
    if peft_warnings:
        raise VerificationError(f"PEFT warns when it loads {exported}: {'; '.join(peft_warnings)}.")
    ours, our_answers = _jlora(adapter, spec, directory, tokenizer, prompts, compute)
    differences = [np.abs(a - b).ravel() for a, b in zip(ours, theirs, strict=True)]
    by_prompt = np.array([difference.max() for difference in differences])  # NaN if one is NaN
    largest, median = float(by_prompt.max()), float(np.median(np.concatenate(differences)))
    equal = sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
    packages = ("jax", "flax", "transformers") + (() if weaker else ("torch", "peft"))
    versions = {"jlora": jlora.__version__, **{name: importlib.metadata.version(name) for name in packages}}
    reader = "jlora's own reader (a weaker check: PyTorch and PEFT are not installed)"
    checked_with = reader if weaker else f"PEFT {versions['peft']}"
    base = "" if compute.quantize == "none" else f" and the {compute.quantize} base model"
    figures = (
        f"{checked_with} on {exported}{base}: {plural(len(prompts), 'prompt')}, float32 logits differ by at most "
        f"{largest:.1e} (median {median:.1e}), {equal} of {len(prompts)} greedy answers of {NEW_TOKENS} tokens are "
        "equal"
    )
    if not largest <= TOLERANCE or equal < AGREEMENT * len(prompts):
        limits = f"at most {TOLERANCE:g} for logits, at least {AGREEMENT:.0%} for answers"
        beyond, worst = int(np.sum(~(by_prompt <= TOLERANCE))), questions[int(by_prompt.argmax())]
        raise VerificationError(
            f"The exported adapter does not compute what was trained ({limits}). {figures}. The logits of "
            f"{plural(beyond, 'prompt')} differ by more; those of {worst[:60]!r} differ most."
        )
    sentence = f"Verified with {figures}"
    return Parity(checked_with, weaker, questions, largest, median, equal, NEW_TOKENS, versions, sentence)


def read_prompts(
    record: dict[str, Any], tokenizer: Any, count: int, data: str = ""
) -> tuple[list[str], list[list[int]]]:
    """Returns the first questions of a run's held-out rows, or else of its training rows, and their prompts.

    Args:
      data: other rows to read, as for `train_data_dir`.
    """
    reading, recorded = ReadOptions.from_config(record["config"]), record["data"]
    use = splits.TRAIN if data else recorded.get("question_files", splits.TRAIN)  # runs from older versions lack it
    rows = read_conversations(data or recorded["questions"], "the questions", reading, use=use)[:count]
    asked = [row.messages[:-1] or row.messages for row in rows]
    prompts = [encode_prompt(tokenizer, asks, row.tools) for asks, row in zip(asked, rows, strict=True)]
    return [messages[-1].content for messages in asked], prompts


def _read_back(
    exported: Path, directory: Path, tokenizer: Any, prompts: list[list[int]], compute: ComputeSettings
) -> tuple[list[np.ndarray], list[list[int]]]:
    config = read_config(directory)
    spec = read_spec(exported, config.num_hidden_layers)
    _, shapes, _ = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
    adapter = read_adapter(exported, spec, shapes, tied=config.tie_word_embeddings)
    return _jlora(adapter, spec, directory, tokenizer, prompts, compute)


def _peft(
    directory: Path,
    exported: Path,
    prompts: list[list[int]],
    ends: frozenset[int],
    compute: ComputeSettings,
    vocabulary: int,
) -> tuple[list[np.ndarray], list[list[int]], list[str]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if vocabulary:
            base.resize_token_embeddings(vocabulary, mean_resizing=False)
        if compute.quantize != "none":  # take the dequantized weights, not those in the files
            with torch.no_grad():
                stored = hf_loader.load_base_alone(directory, compute, vocabulary)
                for name, values in hf_loader.dequantized_weights(stored):
                    base.get_parameter(name).copy_(torch.tensor(values))
        model = PeftModel.from_pretrained(base, exported).eval()
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    peft_warnings = [text for text in texts if not text.startswith(MERGING)]
    logits, answers = [], []
    with torch.no_grad():
        # A first call of cos or exp may be inexact in one of several threads: github.com/pytorch/pytorch/issues/188792.
        model(torch.tensor(prompts[:1]))
        for prompt in tqdm(prompts, desc="PEFT", unit="prompt", disable=None):
            ids = torch.tensor([prompt])
            logits.append(model(ids).logits[0].numpy())
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
            )[0, len(prompt) :].tolist()
            answers.append([token for token in new if token not in ends])
    return logits, answers, peft_warnings


def _jlora(
    adapter: Adapter,
    spec: AdapterSpec,
    directory: Path,
    tokenizer: Any,
    prompts: list[list[int]],
    compute: ComputeSettings,
) -> tuple[list[np.ndarray], list[list[int]]]:
    with jax.default_matmul_precision("highest"):  # otherwise GPUs and TPUs round float32 products
        graphdef, _, _ = hf_loader.abstract_model(read_config(directory), spec, compute)
        base = hf_loader.load_base_alone(directory, compute, spec.vocabulary)
        generator = Generator(directory, tokenizer, graphdef, base, AdapterSet({"": 0}, adapter, spec), compute)

        @jax.jit
        def forward(adapter: Adapter, base: Any, ids: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, adapter, base)
            hidden, _ = model(ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
            return model.logits(hidden[0])

        longest = max(map(len, prompts))  # one program for all: later tokens do not change a token's logits
        logits = [
            np.asarray(forward(adapter, base, jnp.array([prompt + [0] * (longest - len(prompt))])))[: len(prompt)]
            for prompt in prompts
        ]
        return logits, generator.generate_batch([(1.0,)] * len(prompts), prompts, NEW_TOKENS)
