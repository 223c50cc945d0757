"""The forms that servers read: plain LoRA, GGUF, and what they refuse; and a run that uses many variants."""

import dataclasses
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from programs import short_run
from safetensors import safe_open
from safetensors.numpy import load_file
from variants import (
    TOKENS,
    Ours,
    torch_base,
    torch_logits,
    write_models,
)

from jlora.adapters import params, plain_lora
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import TARGETS, AdapterSpec
from jlora.api import finetune
from jlora.bases.gguf_base import _gguf_to_hf_rows as half_rotation
from jlora.common.errors import UserError, VerificationError
from jlora.config.files import load_config
from jlora.export.exporter import load_adapter
from jlora.export.gguf_adapter import FILE, check_gguf, hf_to_gguf_rows, write_gguf
from jlora.export.servers import convert_for_server
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.serve import loading
from jlora.training import setup


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm):
    return write_models(tmp_path_factory, smollm)


@pytest.mark.slow
def test_plain_lora_form_is_equivalent(models, tmp_path):
    spec = AdapterSpec(
        4,
        8.0,
        0.0,
        ("q_proj", "v_proj", "model.layers.1.mlp.down_proj"),
        use_rslora=True,
        rank_pattern=(("layers.0.self_attn.q_proj", 2), ("v_proj", 6)),
        alpha_pattern=(("layers.2.self_attn.v_proj", 3.0),),
        layers_to_transform=(0, 2),
    )
    ours = Ours(models[True], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    for path, leaves in params.modules(adapter):
        within = jnp.any(leaves["lora_A"] != 0, axis=2)[:, None]
        leaves["lora_B"] = jnp.where(
            within, 0.05 * jax.random.normal(jax.random.key(len(path)), leaves["lora_B"].shape), 0
        )
    plain, form = plain_lora.to_plain_lora(adapter, spec)
    assert form == AdapterSpec(6, 6.0, 0.0, form.target_modules)
    assert set(form.target_modules) == {"q_proj", "v_proj", "down_proj"}
    assert plain_lora.is_uniform_lora(form) and not plain_lora.is_uniform_lora(spec)
    other = Ours(models[True], form)
    want = ours.logits(adapter, TOKENS[0])
    assert np.abs(other.logits(plain, TOKENS[0]) - want).max() < 1e-6 * np.abs(want).max()
    other.write(plain, tmp_path / "portable")
    loaded = peft.PeftModel.from_pretrained(torch_base(models[True]), tmp_path / "portable")
    assert np.abs(torch_logits(loaded, TOKENS[0]) - want).max() < 1e-4
    # float32's own noise is above 1e-6 here (the same ranks in another order move a logit by 1.4e-6): in float64, then
    ours.write(adapter, tmp_path / "original")
    original = peft.PeftModel.from_pretrained(torch_base(models[True]), tmp_path / "original")
    exact, other_form = (torch_logits(model.double(), TOKENS[0]) for model in (original, loaded))
    assert exact.dtype == np.float64 and np.abs(other_form - exact).max() < 1e-6
    nothing = ours.logits(params.neutral(spec, adapter, ours.base), TOKENS[0])
    assert np.abs(nothing - want).max() > 0.05


def test_gguf_adapter_equals_the_trained_adapter(models, tmp_path, smollm):
    spec = AdapterSpec(
        4,
        8.0,
        0.0,
        TARGETS,
        use_rslora=True,
        rank_pattern=(("q_proj", 2),),
        layers_to_transform=(0, 2),
        init_lora_weights="pissa",
    )
    ours = Ours(models[True], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    for _, leaves in params.modules(adapter):
        leaves["lora_B"] = 1.5 * leaves["lora_B"]
    form = convert_for_server("llama.cpp", adapter, spec, 0)
    sentence = write_gguf((adapter, spec), form, models[True], tmp_path / "made")
    assert "the deltas of 21 weights" in sentence
    reader = gguf.GGUFReader(tmp_path / "made" / FILE)
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "general.architecture")}
    assert list(fields.values()) == ["adapter", "lora", "llama"]
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes["blk.2.ffn_down.weight.lora_a"] == (8, 96) and shapes["blk.2.attn_k.weight.lora_b"] == (64, 8)
    heads = {"q_proj": 2, "k_proj": 1}
    for wrong, file_heads in ((dataclasses.replace(spec, alpha=9.0), heads), (spec, {})):  # scale, order of rows
        with pytest.raises(VerificationError, match="does not compute what was trained: blk"):
            check_gguf(tmp_path / "made" / FILE, (adapter, wrong), file_heads)
    with pytest.raises(UserError, match="exists, and jlora never overwrites"):
        write_gguf((adapter, spec), form, models[True], tmp_path / "made")


def test_gguf_row_order_matches_a_real_file(smollm):
    with safe_open(smollm / "model.safetensors", framework="numpy") as file:
        weight = file.get_tensor("model.layers.3.self_attn.k_proj.weight")
    assert np.array_equal(half_rotation(hf_to_gguf_rows(weight, 3), 3), weight)  # half_rotation read the real file
    assert not np.array_equal(hf_to_gguf_rows(weight, 3), weight)


@pytest.mark.parametrize(
    ("changes", "max_rank", "message"),
    [
        ({"use_dora": True}, 0, r"vLLM does not support DoRA \(use_dora\)\. Merge it into the base model"),
        ({"modules_to_save": ("lm_head",)}, 0, "vLLM does not support modules_to_save=lm_head. Merge"),
        ({"peft_type": "IA3"}, 0, "vLLM does not support IA3. Merge"),
        ({"rank": 17}, 0, "rank 17, but vLLM would be started with a maximum rank of 16. Add --max_lora_rank 32"),
        ({"rank": 600}, 512, "Rank 600 exceeds vLLM's limit of 512. Merge"),
    ],
)
def test_unsupported_adapters_are_refused_before_writing(changes, max_rank, message):
    spec = AdapterSpec(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ("q_proj",), **changes})
    with pytest.raises(UserError, match=message):
        convert_for_server("vllm", {}, spec, max_rank)
    assert convert_for_server("peft", {}, spec, 0) == ({}, spec)


@pytest.mark.slow
def test_run_with_many_variants_resumes_bit_for_bit_and_answers(tmp_path, tiny, pairs, capsys, monkeypatch):
    monkeypatch.setattr(setup, "find_devices", lambda device: jax.devices()[:1])
    (tmp_path / "few.txt").write_text("\n\n".join((pairs / "train.txt").read_text().split("\n\n")[:4]))
    settings = short_run(
        tiny,
        tmp_path / "few.txt",
        tmp_path / "whole",
        max_steps=4,
        save_steps=2,
        learning_rate=1e-3,
        lora_dropout=0.1,
        use_dora=True,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"layers.2.mlp.up_proj": 2},
        modules_to_save=["embed_tokens"],
        loraplus_lr_ratio=4,
        neftune_noise_alpha=5,
    )
    (tmp_path / "run.yaml").write_text(json.dumps(settings))

    def run(*overrides):
        finetune(load_config(str(tmp_path / "run.yaml"), list(overrides)))

    run()
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved/checkpoints/4")
    shutil.rmtree(tmp_path / "halved/adapter")
    run(f"--config.output_dir={tmp_path / 'halved'}", "--config.resume_from_checkpoint=auto")
    assert "from step 2, exactly" in capsys.readouterr().out
    one, other = (load_file(tmp_path / place / "adapter" / WEIGHTS) for place in ("whole", "halved"))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    generator, adapters = loading.load_model(str(tiny), {"adapter": tmp_path / "whole/adapter"})
    trained = {"adapter": load_adapter(tmp_path / "whole", 4)}
    same = loading.make_generator(tiny, generator.tokenizer, generator.base, trained, FLOAT32_COMPUTE)
    bare = loading.load_model(str(tiny)).generator
    exported, own, base = (
        list(model.generate_tokens(mixture, [1, 2, 3], 8))
        for model, mixture in ((generator, adapters.select(["adapter"])), (same, (1.0,)), (bare, (0.0,)))
    )
    assert exported == own != base == list(same.generate_tokens(same.adapters.none, [1, 2, 3], 8))
