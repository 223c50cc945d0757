"""Adapters that somebody else wrote: their fields and tensors are checked before they are used."""

import dataclasses
import json
import shutil
import time

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from programs import run_program
from safetensors.numpy import load_file, save_file
from test_model import full, load
from test_strangers import SMALL
from tiny_models import make_model

from jlora.adapters.peft_config import base_of, peft_config, read_spec
from jlora.adapters.peft_io import write_adapter
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError
from jlora.export.base_match import check_base_match

SPEC = AdapterSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj"))


def rewrite(file, **changes):
    """Changes keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, smollm):
    """A small base, and an adapter for it that jlora wrote."""
    root = tmp_path_factory.mktemp("adapter")
    base = make_model(root / "base", smollm, **SMALL)
    _, found, _ = load(base, SPEC)
    found = jax.tree.map(lambda leaf: leaf + 0.01, found)
    write_adapter(found, SPEC, peft_config(SPEC, str(base), None, tied=True), "", root / "law")
    return root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha=nan (expected a finite number)"),
        ({"lora_alpha": float("-inf")}, "lora_alpha=-inf (expected a finite number)"),
        ({"lora_alpha": "32"}, "lora_alpha='32' (expected number)"),
        ({"lora_alpha": None}, "must set r and lora_alpha"),
        ({"lora_alpha": 0}, "0 turns it off"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern="),
        ({"r": -1}, "r=-1 (expected greater than 0)"),
        ({"r": 1e10}, "r=10000000000.0 (expected less than or equal to 65536)"),
        ({"r": 4.5}, "r=4.5 (expected integer)"),
        ({"r": True}, "r=True (expected integer)"),
        ({"rank_pattern": ["q_proj"]}, 'rank_pattern=["q_proj"] (expected dictionary)'),
        ({"rank_pattern": {"q_proj": 1e10}}, "rank_pattern="),
        ({"rank_pattern": {"(": 4}}, "is not a valid regular expression"),
        ({"rank_pattern": {"((.|..)+[a-z.]*)+[A-Z]": 4}}, "takes more than 2 s to match"),
        ({"target_modules": "((.|..)+)+[A-Z]"}, "takes more than 2 s to match"),
        ({"target_modules": {"q_proj": 1}}, "target_modules="),
        ({"target_modules": [["q_proj"]]}, "target_modules="),
        ({"target_modules": "(" * 9000}, "is not a valid regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1' (expected list or integer)"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=[-1]"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 (expected less than 1)"),
        ({"peft_type": ["LORA"]}, "peft_type="),
        ({"modules_to_save": "embed_tokens"}, "modules_to_save="),
        ({"use_dora": "yes"}, "use_dora='yes' (expected boolean)"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_field_of_an_adapter_is_named(tmp_path, adapter, changes, message):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    rewrite(place / "adapter_config.json", **changes)
    start = time.process_time()  # what the limit counts
    with pytest.raises(UserError) as error:
        read_spec(place, 2)
    assert time.process_time() - start < 10
    assert message in str(error.value) and str(place) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 100_000, '{"r": ' * 50_000, '{"r": 1e999999}', "{\xff"])
def test_a_broken_adapter_config_is_one_message(tmp_path, adapter, text):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    (place / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"adapter_config.json"):
        read_spec(place, 2)


@pytest.mark.parametrize("base", [None, "", 3])
def test_a_missing_base_is_one_message(tmp_path, adapter, base):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    rewrite(place / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(UserError, match="base_model_name_or_path"):
        base_of(place)


def test_alphas_are_written_as_integers_where_they_are_whole(adapter):
    assert '"lora_alpha": 8,' in (adapter / "law/adapter_config.json").read_text()
    odd = AdapterSpec(4, 8.5, 0.0, ("q_proj",), alpha_pattern=(("q_proj", 16.0), ("v_proj", 2.5)))
    config = peft_config(odd, "base", None, tied=False)
    assert json.dumps([config["lora_alpha"], config["alpha_pattern"]]) == '[8.5, {"q_proj": 16, "v_proj": 2.5}]'


def test_check_accepts_the_adapter_as_written(adapter):
    assert "tensors: as written" in check_base_match(adapter / "law", adapter / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, v: v.view(np.int8), "is I8, expected F16, BF16, F32, F64"),
        (lambda name, v: v.astype(np.int32), "is I32, expected"),
        (lambda name, v: v * np.float32("nan"), "contains NaN or infinity"),
        (lambda name, v: v[:1], "has shape"),
    ],
)
def test_check_refuses_tensors_that_cannot_be_an_adapter(tmp_path, adapter, change, message):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    found = load_file(place / WEIGHTS)
    save_file({name: np.ascontiguousarray(change(name, v)) for name, v in found.items()}, place / WEIGHTS)
    with pytest.raises(UserError, match=message):
        check_base_match(place, adapter / "base")


def test_zero_tensors_are_named(tmp_path, adapter):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    found = load_file(place / WEIGHTS)
    name = next(name for name in found if "lora_B" in name)
    save_file({name: np.zeros_like(values) for name, values in found.items()}, place / WEIGHTS)
    assert "tensors: all lora_B tensors are zero" in check_base_match(place, adapter / "base")
    save_file(found | {name: np.zeros_like(found[name])}, place / WEIGHTS)
    assert f"1 tensor of {len(found)} are all zero, such as {name}" in check_base_match(place, adapter / "base")


@pytest.mark.parametrize("bits", [1, 1000])
def test_flipped_bits_are_found(tmp_path, adapter, bits):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    raw = bytearray((place / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    places = np.random.RandomState(bits).randint(start, len(raw), bits)
    for where in places:
        raw[where] ^= 1  # the lowest bit of a byte leaves most numbers finite and plausible
    (place / WEIGHTS).write_bytes(raw)
    with pytest.raises(UserError, match="is damaged"):
        check_base_match(place, adapter / "base")
    done = run_program("jlora.generate", "--adapter", place, "--prompt", "Is it?", "--max_new_tokens", 1)
    assert done.returncode == 2 and "is damaged" in done.stderr and "Traceback" not in done.stderr


def test_tensors_of_any_float_dtype_are_read(tmp_path, adapter):
    place = shutil.copytree(adapter / "law", tmp_path / "law")
    found = {name: values.astype(ml_dtypes.bfloat16) for name, values in load_file(place / WEIGHTS).items()}
    save_file(found, place / WEIGHTS)
    assert "tensors: finite" in check_base_match(place, adapter / "base")


def test_ia3_on_a_full_name_is_loaded_by_peft_and_read_back(tmp_path, adapter):
    targets = ("k_proj", "model.layers.1.mlp.down_proj")
    spec = AdapterSpec(1, 1.0, 0.0, targets, peft_type="IA3", feedforward_modules=("down_proj",))
    _, found, _ = load(adapter / "base", spec)
    write_adapter(found, spec, peft_config(spec, str(adapter / "base"), None, tied=True), "", tmp_path / "ia3")
    model = transformers.AutoModelForCausalLM.from_pretrained(adapter / "base")
    peft.PeftModel.from_pretrained(model, tmp_path / "ia3")  # refuses feedforward_modules that are no targets
    assert read_spec(tmp_path / "ia3", 2) == spec
    rewrite(tmp_path / "ia3/adapter_config.json", target_modules=["k_proj", "down_proj"])
    with pytest.raises(UserError, match="without down_proj"):
        read_spec(tmp_path / "ia3", 2)


@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
def test_a_peft_directory_is_converted_for_a_server_without_its_run(tmp_path, adapter, server):
    patterns = {"rank_pattern": (("layers.1.self_attn.q_proj", 2),), "alpha_pattern": (("v_proj", 3.5),)}
    spec = dataclasses.replace(SPEC, use_rslora=True, layers_to_transform=(1,), **patterns)
    _, found, _ = load(adapter / "base", spec)
    write_adapter(full(found), spec, peft_config(spec, str(adapter / "base"), None, tied=True), "", tmp_path / "own")
    done = run_program("export", "--adapter", tmp_path / "own", "--for", server, "--output", tmp_path / "made")
    assert done.returncode == 0 and "Verified by reading the file back" in done.stdout, done.stderr
    if server == "llama.cpp":
        assert (tmp_path / "made/adapter.gguf").is_file()
        return
    config = json.loads((tmp_path / "made/adapter_config.json").read_text())
    assert (config["use_rslora"], config["rank_pattern"], config["lora_alpha"]) == (False, {}, config["r"])
    logits = []
    for place in ("own", "made"):
        model = transformers.AutoModelForCausalLM.from_pretrained(adapter / "base")
        model = peft.PeftModel.from_pretrained(model, tmp_path / place)
        with torch.no_grad():
            logits.append(model(torch.arange(40)[None]).logits.numpy())
    assert np.abs(logits[0] - logits[1]).max() < 1e-4
    again = run_program("export", "--adapter", tmp_path / "own", "--for", server, "--output", tmp_path / "made")
    assert again.returncode == 2 and "exists, and jlora never overwrites" in again.stderr


def test_an_adapter_that_a_server_does_not_support_is_not_converted(tmp_path, adapter):
    spec = dataclasses.replace(SPEC, use_dora=True)
    _, found, _ = load(adapter / "base", spec)
    write_adapter(found, spec, peft_config(spec, str(adapter / "base"), None, tied=True), "", tmp_path / "dora")
    done = run_program("export", "--adapter", tmp_path / "dora", "--for", "vllm", "--output", tmp_path / "made")
    assert done.returncode == 2 and "vLLM does not support DoRA" in done.stderr and not (tmp_path / "made").exists()
    done = run_program("export", "--adapter", tmp_path / "dora", "--for", "vllm")
    assert done.returncode == 2 and "requires --output" in done.stderr
    done = run_program(
        *("export", "--adapter", tmp_path / "dora", "--for", "vllm", "--output", tmp_path / "made", "--verify")
    )
    assert done.returncode == 2 and "--verify requires --run" in done.stderr
