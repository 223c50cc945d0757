"""`python -m jlora.data`: what is shown is what is trained on, and it stops where training would."""

import html
import os
import pty
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import command, process_options, run_module

from jlora.cli import data as program
from jlora.common.errors import UserError
from jlora.data import preview
from jlora.data.chat import Example, encode, end_tokens, load_tokenizer
from jlora.data.conversation import Conversation, Message

EVIL = '<script>alert("x")</script> & \x1b[31mred\u202e 依据🙂'


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return load_tokenizer(smollm, "")


@pytest.fixture(scope="module")
def example(tokenizer, smollm):
    turns = (Message("user", "Why [[?"), Message("assistant", EVIL), Message("user", "And?"), Message("assistant", "b"))
    return encode(tokenizer, end_tokens(smollm, tokenizer), Conversation(turns, "<b>.txt:1"))


def test_what_is_marked_is_what_is_trained(tokenizer, example):
    parts = preview.segments(tokenizer, example)
    assert [text for text, trained in parts if trained] == [f"{EVIL}<|im_end|>", "b<|im_end|>"]
    assert "".join(text for text, _ in parts) == tokenizer.decode(example.tokens)
    text = preview.as_text(tokenizer, example, colour=False)
    assert text.endswith("<|im_start|>assistant\n[[b<|im_end|>]]\n") and "\x1b" not in text and "\u202e" not in text
    coloured = preview.as_text(tokenizer, example, colour=True)
    assert f"{preview.GREEN}b<|im_end|>{preview.PLAIN}" in coloured and "\x1b[31m" not in coloured
    whole = Example(example.tokens, np.ones_like(example.trained), "x")
    assert preview.segments(tokenizer, whole) == [(tokenizer.decode(example.tokens), True)]


def test_the_page_is_self_contained_and_escapes_everything(tokenizer, example):
    page = preview.as_page(tokenizer, "<title>", ["a < b {x}"], [example])
    assert "<script" not in page and "http" not in page and "src=" not in page and "\u202e" not in page
    assert "a &lt; b {x}" in page and "&lt;title&gt;" in page and "&lt;b&gt;.txt:1" in page
    marked = [html.unescape(text) for text in re.findall(r"<mark>(.*?)</mark>", page, re.DOTALL)]
    assert marked == ["marked", preview.visible(f"{EVIL}<|im_end|>"), "b<|im_end|>"]


def test_the_program_shows_rows_and_a_summary_without_the_weights(tiny, config_file, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = config_file(base_model=str(bare), eval_share=0.1)
    done = run_module("jlora.data", "--config", file, "--rows", "2", "--config.system_prompt=Be brief.")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"training: 37 examples, [\d,]+ tokens, \d+% of them trained on; the longest has \d+", lines[0])
    assert lines[1].startswith("held out: 3 examples")
    assert re.search(r" 12 steps of 4 examples, laid end to end; sizes to compile: .*; \d+\.\d% of what", done.stdout)
    assert sum(int(count) for count in re.findall(r"tokens  #* *(\d+)\n", done.stdout)) == 37
    assert "2 of 37 rows shown" in done.stdout
    assert done.stdout.count("<|im_start|>system\nBe brief.<|im_end|>\n") == 2
    assert len(re.findall(r"<\|im_start\|>assistant\n\[\[Under Article .*?<\|im_end\|>\]\]", done.stdout)) == 2
    assert not (tmp_path / "run").exists()


def test_on_a_terminal_it_is_coloured(config_file):
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        command("jlora.data", "--config", config_file(), "--rows", "1"), **process_options(1), stdout=writer
    )
    os.close(writer)
    said = b""
    while True:
        try:
            said += os.read(reader, 65536)
        except OSError:  # the other side has closed
            break
    os.close(reader)
    assert process.wait() == 0
    assert f"{preview.GREEN}Under Article" in said.decode() and "[[" not in said.decode()


def test_the_html_flag_writes_the_same(config_file, tmp_path, capsys):
    page = tmp_path / "rows.html"
    program.main(["--config", str(config_file()), "--html", str(page), "--rows", "0"])
    said = capsys.readouterr().out
    assert f"written: {page}" in said and "<|im_start|>" not in said
    text = page.read_text(encoding="utf-8")
    assert text.count("<mark>Under Article") == 40
    assert all(html.escape(line) in text for line in said.splitlines()[:-1])
    with pytest.raises(UserError, match=r"--html .*nowhere/x.html: .* is not a directory"):
        program.main(["--config", str(config_file()), "--html", str(tmp_path / "nowhere/x.html")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 60}, r"longer than max_seq_length=60 tokens: .*Set max_seq_length=\d+, shorten them, or"),
        ({"eval_data_dir": "SAME"}, r"40 held-out question\(s\) are also trained on"),
        ({"pii": "error", "train_data_dir": "PHONE"}, r"1 row\(s\) hold personal data \(phone number in 1\)"),
        ({"base_model": "NO_END"}, "puts no end token after the answer"),
    ],
)
def test_it_refuses_what_training_refuses(config_file, tmp_path, tiny, pairs, changes, message):
    phone = tmp_path / "phone.txt"
    phone.write_text("User: Whom do I call?\nLawyer: Under Article 1, 13800138000.\n")
    no_end = tmp_path / "no-end"
    shutil.copytree(tiny, no_end)
    (no_end / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    places = {"SAME": str(pairs), "PHONE": str(phone), "NO_END": str(no_end)}
    file = config_file(**{key: places.get(value, value) for key, value in changes.items()})
    refusals = []
    for name in ("jlora.data", "jlora.train"):
        done = run_module(name, "--config", file)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        refusals.append(done.stderr[done.stderr.index("error: ") :])
    assert refusals[0] == refusals[1] and re.search(message, refusals[0])
    assert "13800138000" not in refusals[0]


def test_over_long_rows_are_counted_in_the_summary(config_file, capsys):
    for how, said in (("drop", "left out"), ("truncate", "cut there"), ("split", "parts")):
        file = config_file(max_seq_length=90, overlong=how)
        program.main(["--config", str(file), "--rows", "0"])
        out = capsys.readouterr().out
        assert re.search(rf"training: \d+ of 40 examples are longer than 90 tokens: .*{said}", out), out
        lengths = [int(n) for n in re.findall(r": (\d+) tokens, \d+ trained on", out)]
        assert max(lengths) <= 90 and len(lengths) == int(re.search(r"training: (\d+) examples", out)[1])
