"""Adapters of the token tables, and rows for new tokens, from training to PEFT; on tiny random models."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from programs import run_program
from safetensors.numpy import load_file, save_file
from test_strangers import SMALL
from tiny_models import VOCABULARY, make_model

from jlora import load_model
from jlora.adapters.methods import table_method
from jlora.adapters.methods.lora import dropout
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import AdapterSpec
from jlora.models.llama import scores

WORDS = ["<NEW>", "<OLD>"]
NEW = [VOCABULARY, VOCABULARY + 1]
QUESTION = "What is <NEW>?"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def grown(request, tmp_path_factory, smollm):
    """Whether the head is tied, and a base whose tokenizer has two tokens that its weights lack."""
    directory = make_model(tmp_path_factory.mktemp("grown"), smollm, **SMALL, tie_word_embeddings=request.param)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(directory)
    return request.param, directory


def write_config(directory, base, **settings):
    """Writes a config whose rows contain the new words."""
    rows = [{"instruction": f"What is {word}?", "output": f"It is {word} {n}."} for word in WORDS for n in range(4)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {"base_model": str(base), "train_data_dir": str(directory / "rows.jsonl"), "sample_questions": 1}
    config |= {
        "resize_embeddings": True,
        "output_dir": str(directory / "run"),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "warmup_ratio": 0,
    }
    (directory / "config.yaml").write_text(json.dumps(config | settings))
    return directory / "config.yaml"


def peft_logits(base, adapter, ids, rows=0):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["trainable_token_indices", "modules_to_save"])
def test_new_words_are_trained_exported_answered_and_merged(tmp_path, grown, way):
    tied, base = grown
    if not tied and way == "modules_to_save":
        pytest.skip("tables trained in full are compared untied in test_variants.py")
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    rows = NEW if tied else dict.fromkeys(tables, NEW)
    setting = {"modules_to_save": tables, "trainable_token_indices": rows}[way]
    done = run_program("jlora.train", "--config", write_config(tmp_path, base, **{way: setting}))
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run/adapter"
    if tied and way == "trainable_token_indices":
        done = run_program("jlora.export", "--run", tmp_path / "run", "--verify")
        assert done.returncode == 0 and "Verified with PEFT" in done.stdout, done.stderr

    named = load_file(adapter / WEIGHTS)
    height = 2 if way == "trainable_token_indices" else VOCABULARY + 2
    assert [len(values) for name, values in named.items() if "embed_tokens" in name] == [height]
    card = (adapter / "README.md").read_text()
    assert f"model.resize_token_embeddings({VOCABULARY + 2})" in card

    model = load_model(str(base), {"law": adapter})
    ids = model.generator.tokenizer(QUESTION)["input_ids"]
    assert NEW[0] in ids
    (ours,) = model.generator.next_token_logits([model.adapters.select(["law"])], [ids])
    theirs = peft_logits(base, adapter, ids, VOCABULARY + 2)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-4
    asked = run_program("jlora.generate", "--adapter", adapter, "--prompt", QUESTION, "--max_new_tokens", 3)
    assert asked.returncode == 0, asked.stderr

    done = run_program("jlora.export", "--run", tmp_path / "run", "--merged")
    assert done.returncode == 0, done.stderr
    assert np.abs(peft_logits(tmp_path / "run/merged", None, ids) - theirs).max() < 1e-4

    metadata = {"jlora_vocabulary": "99999999999"}
    shutil.copytree(adapter, tmp_path / "huge")
    save_file(named, tmp_path / "huge" / WEIGHTS, metadata=metadata)
    asked = run_program("jlora.generate", "--adapter", tmp_path / "huge", "--prompt", QUESTION)
    assert asked.returncode == 2 and "records jlora_vocabulary='99999999999', but it trains no token" in asked.stderr

    further = write_config(tmp_path, base, init_adapter=str(adapter), output_dir=str(tmp_path / "more"), max_steps=1)
    done = run_program("jlora.train", "--config", further)
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "more/adapter" / WEIGHTS)
    assert again.keys() == named.keys() and any(np.any(again[name] != named[name]) for name in named)


def test_new_rows_that_nothing_trains_are_refused(tmp_path, grown):
    tied, base = grown
    done = run_program("jlora.data", "--config", write_config(tmp_path, base))
    assert done.returncode == 2
    assert "adds rows for 2 tokens of the tokenizer, such as '<NEW>', but the settings do not train" in done.stderr
    advice = str(NEW) if tied else f"{{embed_tokens: {NEW}, lm_head: {NEW}}}"
    assert f"Set trainable_token_indices={advice}, or modules_to_save=" in done.stderr
    override = f"--config.trainable_token_indices={advice}"
    assert run_program("jlora.data", "--config", write_config(tmp_path, base), override).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [VOCABULARY + 2]}, f"has {VOCABULARY + 2}: Expected ids from 0 to"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "has other tokens for lm_head than for embed_tokens"),
        (
            {"trainable_token_indices": [1], "target_modules": ["lm_head"]},
            "trainable_token_indices and target_modules both change the table that this base model ties",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_tables_are_refused(tmp_path, smollm, settings, message):
    base = make_model(tmp_path / "base", smollm, **SMALL)
    done = run_program("jlora.train", "--config", write_config(tmp_path, base, resize_embeddings=False, **settings))
    assert done.returncode == 2 and message in done.stderr


def test_a_copy_of_another_base_model_in_an_adapter_is_refused(tmp_path, smollm):
    base = make_model(tmp_path / "base", smollm, **SMALL)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "theirs")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    asked = ["jlora.generate", "--base", base, "--max_new_tokens", 2, "--prompt", "Is it?", "--adapter"]
    assert run_program(*asked, tmp_path / "theirs").returncode == 0
    shutil.copytree(tmp_path / "theirs", tmp_path / "other")
    named = load_file(tmp_path / "other" / WEIGHTS)
    named[name][7, 3] += 0.5
    save_file(named, tmp_path / "other" / WEIGHTS)
    for command in (asked, ["jlora.export", "--base", base, "--check"]):
        done = run_program(*command, tmp_path / "other")
        assert done.returncode == 2 and "contains a copy of embed_tokens that differs" in done.stderr, done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["lm_head"]}, "a table that the base model ties"),
        ({"lora_bias": True}, "such as model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_merge_that_the_base_model_has_no_place_for_is_refused(tmp_path, smollm, changes, message):
    base = make_model(tmp_path / "base", smollm, **SMALL)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    done = run_program(
        *("jlora.export", "--merged", "--base", base, "--adapter", tmp_path / "theirs", "--output", tmp_path / "m")
    )
    assert done.returncode == 2 and message in done.stderr


def test_dropout_acts_on_the_input_of_a_head_with_lora():
    spec = AdapterSpec(4, 8.0, 0.5, ("lm_head",))
    method, random = table_method(spec, "lm_head", tied=False), np.random.RandomState(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    hidden, weight, leaves = draw(2, 3, 16), draw(32, 16), {"lora_A": draw(4, 16), "lora_B": draw(32, 4)}
    for key in (None, jax.random.key(1)):
        change = 2.0 * dropout(hidden, 0.5, key) @ leaves["lora_A"].T @ leaves["lora_B"].T
        got = scores(*method.head(hidden, weight, leaves, key))
        assert np.allclose(got, hidden @ weight.T + change, atol=1e-4)
