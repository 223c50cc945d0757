"""Files that somebody else wrote: bases, adapters and templates are understood as their libraries do, or refused."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from programs import run_program
from safetensors.numpy import load_file, save_file
from test_families import eager_logits
from test_model import load
from tiny_models import VOCABULARY, make_model

from jlora.adapters.spec import NO_ADAPTER
from jlora.cli.program import run_program as run_main
from jlora.common.atomic_io import UNFINISHED, unnamed_directory
from jlora.common.errors import UserError
from jlora.common.terminal import EscapedStream
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Message
from jlora.data.named_templates import TEMPLATES
from jlora.data.template_check import find_excess
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.models.families import read_config
from jlora.training.resume import lock_run_directory

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
TOKENS = np.random.RandomState(0).randint(0, VOCABULARY, (1, 24)).astype(np.int32)

# Token ids beyond the embedding


@pytest.fixture(scope="module")
def grown(tmp_path_factory, smollm):
    """A base whose tokenizer has a token that its weights lack."""
    directory = make_model(tmp_path_factory.mktemp("grown"), smollm, **SMALL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<NEW>"])
    tokenizer.save_pretrained(directory)
    return directory


ROW = {"instruction": "What is it?", "output": "It is Paris."}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"instruction": "Why <NEW>?"}, {}),
        ({"output": "It is <NEW>."}, {}),
        ({"system": "Be <NEW>."}, {}),
        ({}, {"system_prompt": "Say <NEW>"}),
        ({}, {"chat_template": "own.jinja"}),
        ({}, {"task_type": "plain-text"}),
    ],
    ids=str,
)
def test_a_token_without_a_row_in_the_embedding_is_refused_before_weights_are_read(tmp_path, grown, row, settings):
    rows = [ROW | {"instruction": f"Who is {name}?"} for name in "ABCDEFGH"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in [*rows, ROW | row]))
    if "task_type" in settings:
        (tmp_path / "rows.jsonl").write_text('{"text": "Rows of <NEW> text."}\n')
    if "chat_template" in settings:
        template = tmp_path / "own.jinja"
        template.write_text(TEMPLATES["chatml"].replace("content | trim", "content | trim + '<NEW>'"))
        settings = {"chat_template": str(template)}
    config = {
        "base_model": str(grown),
        "train_data_dir": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "o"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config | settings | {"sample_questions": 0}))
    weights = (grown / "model.safetensors").rename(grown / "away")  # they are not needed to see it
    try:
        done = run_program("jlora.train", "--config", tmp_path / "config.yaml")
    finally:
        weights.rename(grown / "model.safetensors")
    assert done.returncode == 2, done.stderr
    assert (
        f"The token '<NEW>' has id {VOCABULARY}, but the base model embeds only ids below {VOCABULARY}" in done.stderr
    )
    assert "rows.jsonl:" in done.stderr


def test_the_advice_for_such_a_token_works(tmp_path, grown):
    model = transformers.AutoModelForCausalLM.from_pretrained(grown)
    model.resize_token_embeddings(VOCABULARY + 1)
    shutil.copytree(grown, tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"output": "It is <NEW>."}))
    config = {"base_model": str(tmp_path / "base"), "train_data_dir": str(tmp_path / "rows.jsonl")}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = run_program("jlora.data", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0 and "<NEW>" in done.stdout, done.stderr


def test_such_a_token_in_a_prompt_is_refused_and_other_prompts_are_answered(grown):
    refused = run_program("jlora.generate", "--base", grown, "--prompt", "Is it <NEW>?", "--max_new_tokens", 2)
    assert refused.returncode == 2 and f"The token '<NEW>' has id {VOCABULARY}" in refused.stderr
    assert run_program("jlora.generate", "--base", grown, "--prompt", "Is it?", "--max_new_tokens", 2).returncode == 0


# Tied tables


def theirs(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def same_head(values):
    return values.copy()


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (same_head, True),
        (lambda v: v[::-1].copy(), False),
        (
            lambda v: v + np.float32(1e-3) * (np.arange(len(v))[:, None] == VOCABULARY - 1),
            False,
        ),  # in the last row alone
        (lambda v: np.zeros_like(v), False),
        (lambda v: v.astype(np.float16), False),
    ],
    ids=["equal", "reversed", "last row", "zeros", "rounded"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_of_its_own_in_a_tied_model_is_used_as_transformers_does(
    tmp_path, smollm, capsys, change, tied, sharded
):
    directory = make_model(tmp_path / "base", smollm, **SMALL)
    weights = load_file(directory / "model.safetensors")
    head = change(weights["model.embed_tokens.weight"])
    if sharded:
        save_file(weights, directory / "a.safetensors", metadata={"format": "pt"})
        save_file({"lm_head.weight": head}, directory / "b.safetensors", metadata={"format": "pt"})
        places = dict.fromkeys(weights, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (directory / "model.safetensors").unlink()
    else:
        save_file(weights | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    want = theirs(directory)
    assert read_config(directory).tie_word_embeddings == tied
    assert ("the model has a different lm_head.weight: not tied" in capsys.readouterr().err) == (not tied)
    assert np.abs(eager_logits(*load(directory, NO_ADAPTER), TOKENS) - want).max() < 2e-4


# generation_config.json and chat templates


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": "2"}', "[]", "{", '{"eos_token_id": [2, null]}', '{"eos_token_id": {}}']
)
def test_a_bad_generation_config_is_one_message(tmp_path, tiny, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config.json"):
        end_tokens(tmp_path, load_tokenizer(tiny, ""))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% if %}", "The chat template is broken, line 1"),
        ("{{ messages.nothing.here }}", "has no attribute 'nothing'"),
        ("{% include 'other' %}", "rejects this conversation: no loader"),
        ("{{ messages[0].content + 3 }}", "rejects this conversation"),
        ("{% for i in range(10 ** 12) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[9].content.x }}", "rejects this conversation"),
    ],
)
def test_a_template_that_fails_is_one_message(tiny, tmp_path, template, message):
    (tmp_path / "own.jinja").write_text(template)
    tokenizer = load_tokenizer(tiny, str(tmp_path / "own.jinja"))
    with pytest.raises(UserError, match=message):
        encode_prompt(tokenizer, (Message("user", "Is it?"),))


@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content * 10 ** 7 }}{% endgeneration %}{% endfor %}",
    ],
)
def test_a_template_without_bounds_is_stopped(tiny, tmp_path, template):
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(UserError, match=r"was stopped: it (runs|needs|makes)"):
        load_tokenizer(tiny, str(tmp_path / "own.jinja"))


def test_templates_in_use_are_not_stopped(smollm):
    own = (smollm / "chat_template.jinja").read_text()
    assert [find_excess(template) for template in (own, *TEMPLATES.values())] == [""] * 7


# What reaches the terminal and the disk

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_control_characters_never_reach_the_terminal(capsys, stream):
    def main(argv):
        print(f"before {ESCAPES} after\n\tline", file=getattr(sys, stream))
        raise UserError(f"{ESCAPES} in a message")

    with pytest.raises(SystemExit):
        run_main(main, [])
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert "before \\u001b[2J" in text and "after\n\tline" in text and "error: \\u001b" in text


def test_every_way_of_writing_to_a_stream_is_escaped():
    plain = io.StringIO()
    print(ESCAPES, file=EscapedStream(plain))
    EscapedStream(plain).writelines([ESCAPES, ESCAPES])
    assert plain.getvalue().count("title") == 3 and not set("\x1b\x07\x9b\u202e") & set(plain.getvalue())


def test_a_terminal_escape_in_a_file_is_shown_as_a_code(tmp_path, tiny):
    (tmp_path / "rows.csv").write_text(f"question{ESCAPES},answer\nIs it?,It is.\n")
    (tmp_path / "config.yaml").write_text(
        json.dumps({"base_model": str(tiny), "train_data_dir": str(tmp_path / "rows.csv")})
    )
    done = run_program("jlora.data", "--config", tmp_path / "config.yaml", "--config.x\x1b[2J=3")
    assert "\x1b" not in done.stdout + done.stderr and "\\u001b" in done.stderr
    done = run_program("jlora.data", "--config", tmp_path / "config.yaml")
    assert "\x1b" not in done.stdout + done.stderr and "\\u001b" in done.stderr + done.stdout


HOLD = """
import sys, time
from pathlib import Path
from jlora.common.atomic_io import unnamed_directory
with unnamed_directory(Path(sys.argv[1])) as made:
    (made / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_are_not(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        left = sorted(tmp_path.glob(f"{UNFINISHED}*"))
        assert len(left) == 2
        writers[0].kill()
        writers[0].wait()
        (tmp_path / f"{UNFINISHED}mine").mkdir()  # a name that tempfile does not make
        until = time.monotonic() + 60
        while len(list(tmp_path.glob(f"{UNFINISHED}*"))) > 2 and time.monotonic() < until:
            with unnamed_directory(tmp_path):
                time.sleep(1)  # a writer has ten seconds to lock its own
        names = {path.name for path in tmp_path.glob(f"{UNFINISHED}*")}
        assert len(names) == 2 and f"{UNFINISHED}mine" in names
        alive = next(path for path in tmp_path.glob(f"{UNFINISHED}*") if path.name != f"{UNFINISHED}mine")
        assert (alive / "new/half").read_text() == "x"
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_the_lock_file_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"), lock_run_directory(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_tokenized_rows_are_readable_by_their_owner_alone(tmp_path, tiny, pairs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text(json.dumps({"base_model": str(tiny), "train_data_dir": str(pairs)}))
    assert run_program("jlora.data", "--config", tmp_path / "config.yaml").returncode == 0
    cache = tmp_path / "jlora/prepared"
    files = [cache, *cache.rglob("*")]
    assert len(files) > 4
    assert {stat.S_IMODE(os.stat(file).st_mode) & 0o077 for file in files} == {0}
