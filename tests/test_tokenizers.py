"""Tokenizers and chat templates: the base model's own, sentencepiece models, named templates; and the hub's cache."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import transformers
from programs import command, process_options, run_program
from tokenizers import Regex, pre_tokenizers

from jlora.bases.gguf_tokenizer import LLAMA3
from jlora.bases.resolve import hub_commit, resolve_base
from jlora.common.errors import UserError
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Conversation, Message
from jlora.data.loss_mask import encode_conversation
from jlora.data.named_templates import TEMPLATES
from jlora.data.tokenizer import load_tokenizer

TURNS = (
    Message("system", "Be brief."),
    Message("user", "What is due? 🙂"),
    Message("assistant", "依据第47条，pay."),
    Message("user", "And?"),
    Message("assistant", "No."),
)
TRAINED = {  # template -> the trained text of the two answers above, with SmolLM2's <|im_end|> as the end token
    "alpaca": ["依据第47条，pay.<|im_end|>", "No.<|im_end|>"],
    "chatml": ["依据第47条，pay.<|im_end|>", "No.<|im_end|>"],
    "llama2": [" 依据第47条，pay. <|im_end|>", " No. <|im_end|>"],
    "llama3": ["依据第47条，pay.<|eot_id|>", "No.<|eot_id|>"],
    "mistral": [" 依据第47条，pay.<|im_end|>", " No.<|im_end|>"],
    "vicuna": [" 依据第47条，pay.<|im_end|>", " No.<|im_end|>"],
}


def without(directory, source, *names):
    """Copies a model directory without some files."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns(*names))
    return directory


@pytest.fixture(scope="module")
def bare(tmp_path_factory, tiny):
    """A base model without a chat template."""
    return without(tmp_path_factory.mktemp("bare") / "base", tiny, "chat_template.jinja")


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_train_answers_and_their_end_tokens(bare, name):
    tokenizer = load_tokenizer(bare, name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    if name == "llama3":  # it needs Llama 3's own splitting, where line ends never depend on what follows
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pieces])
    ends = frozenset([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")])
    example = encode_conversation(tokenizer, ends, Conversation(TURNS, "rows.txt:1"))
    trained, last = [], False
    for token, now in zip(example.tokens.tolist(), example.loss_mask, strict=True):
        if now:
            trained = [*trained, []] if not last else trained
            trained[-1].append(token)
        last = now
    assert [tokenizer.decode(run) for run in trained] == TRAINED[name]
    text = tokenizer.decode(example.tokens)
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index("What is due?")
    prompt = encode_prompt(tokenizer, TURNS[:-1])
    assert example.tokens[: len(prompt)].tolist() == prompt and not example.loss_mask[len(prompt) - 1]


def test_base_without_a_template_needs_chat_template(bare, tmp_path):
    with pytest.raises(
        UserError, match=r"has no chat template.*set chat_template to .*: alpaca, chatml, llama2, llama3,"
    ):
        encode_conversation(load_tokenizer(bare, ""), frozenset([2]), Conversation(TURNS, "rows.txt:1"))
    with pytest.raises(
        UserError,
        match=r"chat_template='llama4' is neither a known name nor a readable file .*Expected alpaca, .*, or the path",
    ):
        load_tokenizer(bare, "llama4")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert load_tokenizer(bare, str(tmp_path / "mine.jinja")).chat_template.startswith("{% for m")


def test_plain_text_needs_no_template(bare, config_file, tmp_path):
    (tmp_path / "book.txt").write_text("One.\n\nTwo two.\n\nThree three three.\n\nFour.\n")
    config = config_file(base_model=str(bare), train_data_dir=str(tmp_path / "book.txt"), task_type="plain-text")
    done = run_program("jlora.train", "--config", config, "--config.max_steps=2")
    # all but each text's first token, which nothing predicts
    assert done.returncode == 0 and "training: 4 examples, 19 tokens, 79% of them" in done.stdout, done.stderr


@pytest.mark.slow
def test_adapter_includes_the_chat_template_it_was_trained_with(bare, config_file, tmp_path):
    config = config_file(base_model=str(bare), chat_template="alpaca", max_steps=2, save_steps=2)
    done = run_program("jlora.train", "--config", config)
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == TEMPLATES["alpaca"]
    assert "trained with chat_template.jinja" in (adapter / "README.md").read_text()
    done = run_program("jlora.generate", "--adapter", adapter, "--prompt", "Hi", "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr
    other = config_file(base_model=str(bare), chat_template="vicuna", max_steps=2, save_steps=2)
    done = run_program("jlora.train", "--config", other, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 2 and "chat_template changed from 'alpaca' to 'vicuna'" in done.stderr


@pytest.mark.network
def test_sentencepiece_model_is_read_as_transformers_does(mistral_v1, tmp_path, monkeypatch):
    directory = tmp_path / "spm"
    directory.mkdir()
    shutil.copy(mistral_v1, directory / "tokenizer.model")
    (directory / "config.json").write_text('{"model_type": "llama", "vocab_size": 32000}')
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(directory, "llama2")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    example = encode_conversation(tokenizer, frozenset([2]), Conversation(TURNS, "rows.txt:1"))
    text = (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is due? 🙂 [/INST] 依据第47条，pay. </s>"
        "<s>[INST] And? [/INST] No. </s>"
    )
    assert example.tokens.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    runs = [tokenizer.decode(example.tokens[at : at + 1]) for at in range(len(example.tokens)) if example.loss_mask[at]]
    assert runs.count("</s>") == 2 and "".join(runs).replace(" ", "").endswith("No.</s>")

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"sentencepiece is not installed\. Run: pip install sentencepiece protobuf"):
        load_tokenizer(directory, "")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, tiny):
    """A hub cache with one model, whose main branch is at COMMIT; returns its directory."""
    model = tmp_path / "hub" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny, model / "snapshots" / COMMIT)
    return tmp_path / "hub"


@pytest.mark.slow
def test_hub_id_works_offline_and_records_its_commit(hub, config_file, tmp_path):
    config = config_file(base_model="owner/name", max_steps=2, save_steps=2)
    options = process_options(1)
    options["env"] |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command("jlora.train", "--config", config), **options, capture_output=True)
    assert done.returncode == 0, done.stderr
    base = json.loads((tmp_path / "run" / "config.json").read_text())["base"]
    assert (base["hub_id"], base["commit"]) == ("owner/name", COMMIT)
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/name", COMMIT)


def test_failed_hub_downloads_are_explained(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    for revision in ("main", COMMIT):
        assert resolve_base("owner/name", revision).name == COMMIT
    with pytest.raises(UserError, match="or set base_model to a local model directory"):
        resolve_base("owner/name", "other")


def test_only_hub_snapshots_have_a_commit(tmp_path):
    assert hub_commit(tmp_path / "snapshots" / COMMIT) == COMMIT and hub_commit(tmp_path / "mine") == ""
