"""Merged models: without an adapter the base model byte by byte; with one, the same as PEFT's merge."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from programs import run_program
from safetensors.numpy import load_file
from test_families import CASES, make

from jlora.adapters import params
from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import write_adapter
from jlora.adapters.spec import AdapterSpec
from jlora.cli.export import main
from jlora.common.errors import UserError
from jlora.data.named_templates import TEMPLATES
from jlora.distributed.sharding import make_mesh
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config

SPEC = AdapterSpec(
    rank=4, alpha=6.0, dropout=0.0, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
)
HALF_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of the last digit, relative


def tensors(directory):
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def halved(directory, dtype):
    """Saves the same model in another dtype, in shards, with other files next to the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    shutil.rmtree(directory)
    model.save_pretrained(directory, max_shard_size="300KB")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("the base")
    (directory / "pytorch_model.bin").write_text("pickled")
    return directory


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("case", ["llama-tied", "qwen2", "qwen3"])
def test_a_merge_without_adapter_copies_the_base_model(tmp_path, case, dtype):
    base = halved(make(tmp_path / "base", *CASES[case]), dtype)
    main(["--merged", "--base", str(base), "--output", str(tmp_path / "merged")])
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert len(list(base.glob("*.safetensors"))) > 1 and before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == dtype and value.dtype == after[name].dtype and value.tobytes() == after[name].tobytes()
    files = {path.name for path in (tmp_path / "merged").iterdir() if path.suffix != ".safetensors"}
    assert files == {"config.json", "generation_config.json", "tokenizer.json"}
    assert (tmp_path / "merged/config.json").read_bytes() == (base / "config.json").read_bytes()


FORMS = {
    "lora": SPEC,
    "patterned": dataclasses.replace(
        SPEC, use_rslora=True, rank_pattern=(("self_attn.q_proj", 2),), layers_to_transform=(1, 2)
    ),
    "dora": dataclasses.replace(SPEC, use_dora=True),
    "pissa": dataclasses.replace(SPEC, init_lora_weights="pissa"),
    "tables": dataclasses.replace(SPEC, modules_to_save=("embed_tokens", "lm_head")),
    "rows": dataclasses.replace(SPEC, trainable_token_indices=(("embed_tokens", (9, 2, 5)),)),
    "table-lora": dataclasses.replace(SPEC, target_modules=("q_proj", "embed_tokens", "lm_head"), use_rslora=True),
    "bias": dataclasses.replace(SPEC, target_modules=("q_proj",), lora_bias=True),
    "ia3": AdapterSpec(
        1, 1.0, 0.0, ("k_proj", "v_proj", "down_proj"), peft_type="IA3", feedforward_modules=("down_proj",)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "case", "dtype"),
    [("lora", "qwen3", dtype) for dtype in HALF_STEP]
    + [("dora", "qwen2", "bfloat16"), ("tables", "llama-tied", "bfloat16"), ("ia3", "qwen2", "float32")]
    + [("dora", "qwen3", "float32"), ("pissa", "qwen3", "float32"), ("patterned", "qwen3", "float32")]
    + [("rows", "llama-tied", "float32"), ("table-lora", "qwen3", "float32"), ("bias", "qwen2", "float32")],
)
def test_a_merge_equals_pefts(tmp_path, form, case, dtype):
    base, spec = halved(make(tmp_path / "base", *CASES[case]), dtype), FORMS[form]
    config = read_config(base)
    tied = config.tie_word_embeddings
    _, shapes, base_shapes = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
    frozen = hf_loader.load_base(base, base_shapes, make_mesh(jax.devices()[:1]))
    adapter = params.start(spec, shapes, frozen, jax.random.key(0))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), adapter)
    write_adapter(adapter, spec, peft_config(spec, str(base), None, tied=tied), "", tmp_path / "adapter")
    main(["--merged", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    theirs, before, ours = model.state_dict(), tensors(base), tensors(tmp_path / "merged")
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    changed = 0
    for name, value in ours.items():
        want, got = theirs[name].float().numpy(), value.astype(np.float32)
        if value.tobytes() == before[name].tobytes():
            assert np.array_equal(got, want), name
            continue
        changed += 1
        # both round the sum, PEFT the delta before it too: half a step each; DoRA multiplies once more
        steps = 4 if form == "dora" else 2
        room = HALF_STEP[dtype] * (steps * np.abs(want) + np.abs(want - before[name].astype(np.float32)))
        assert np.all(np.abs(got - want) <= room + 3e-7), name
    assert changed == {"tables": 16, "ia3": 9 + 6, "patterned": 10, "rows": 16, "table-lora": 3 + 2, "bias": 3 + 3}.get(
        form, 15
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.dtype == getattr(torch, dtype)


@pytest.mark.slow
def test_a_run_is_merged_by_one_command(tiny, config_file, tmp_path):
    config = config_file(max_steps=2, save_steps=2, learning_rate=1e-2, chat_template="alpaca")
    assert run_program("jlora.train", "--config", config).returncode == 0
    run = tmp_path / "run"
    done = run_program("jlora.export", "--run", run, "--merged")
    assert done.returncode == 0 and done.stdout.strip() == f"Wrote the merged model to {run / 'merged'}", done.stderr
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        want, got = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - want).abs().max() > 1e-2
    assert (want - got).abs().max() < 2e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.chat_template == TEMPLATES["alpaca"]
    done = run_program("jlora.export", "--run", run, "--merged")
    assert done.returncode == 2 and "merged exists, and jlora never overwrites" in done.stderr
    done = run_program("jlora.generate", "--base", run / "merged", "--prompt", "Hi", "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    bases = {case: make(tmp_path / case, *CASES[case]) for case in ("llama-2-gqa", "qwen2")}
    _, shapes, _ = hf_loader.abstract_model(read_config(bases["qwen2"]), SPEC, FLOAT32_COMPUTE)
    config = peft_config(SPEC, str(bases["qwen2"]), None, tied=True)
    write_adapter(params.init(shapes, jax.random.key(0)), SPEC, config, "", tmp_path / "adapter")
    arguments = ["--merged", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    with pytest.raises(UserError, match="belongs to another base"):
        main([*arguments, "--base", str(bases["llama-2-gqa"])])
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text()) == config
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("arguments", [[], ["--merged"], ["--merged", "--base", "x"], ["--run", "x", "--base", "y"]])
def test_conflicting_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "--run" in capsys.readouterr().err
