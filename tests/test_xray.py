"""`jlora data`: the preview shows exactly what is trained on, and stops at the same errors as training."""

import html
import os
import pty
import re
import shutil
import subprocess

import numpy as np
import pytest
from programs import command, process_options, run_program

from jlora.cli import data as program
from jlora.common.errors import UserError
from jlora.common.terminal import escape_controls
from jlora.data import preview
from jlora.data.conversation import Conversation, Message
from jlora.data.examples import Example
from jlora.data.loss_mask import encode_conversation
from jlora.data.tokenizer import end_tokens, load_tokenizer

EVIL = '<script>alert("x")</script> & \x1b[31mred\u202e 依据🙂'


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return load_tokenizer(smollm, "")


@pytest.fixture(scope="module")
def example(tokenizer, smollm):
    turns = (Message("user", "Why [[?"), Message("assistant", EVIL), Message("user", "And?"), Message("assistant", "b"))
    return encode_conversation(tokenizer, end_tokens(smollm, tokenizer), Conversation(turns, "<b>.txt:1"))


def test_marked_text_is_trained_text(tokenizer, example):
    parts = preview.split_by_mask(tokenizer, example)
    assert [text for text, trained in parts if trained] == [f"{EVIL}<|im_end|>", "b<|im_end|>"]
    assert "".join(text for text, _ in parts) == tokenizer.decode(example.tokens)
    text = preview.as_text(tokenizer, example, color=False)
    assert text.endswith("<|im_start|>assistant\n[[b<|im_end|>]]\n") and "\x1b" not in text and "\u202e" not in text
    colored = preview.as_text(tokenizer, example, color=True)
    assert f"{preview.GREEN}b<|im_end|>{preview.RESET}" in colored and "\x1b[31m" not in colored
    whole = Example(example.tokens, np.ones_like(example.loss_mask), "x")
    assert preview.split_by_mask(tokenizer, whole) == [(tokenizer.decode(example.tokens), True)]


def test_html_page_is_self_contained_and_escaped(tokenizer, example):
    page = preview.as_html(tokenizer, "<title>", ["a < b {x}"], np.array([20, 40]), [example])
    assert "<script>alert" not in page and "://" not in page and "src=" not in page and "\u202e" not in page
    assert "a &lt; b {x}" in page and "&lt;title&gt;" in page and "&lt;b&gt;.txt:1" in page
    marked = [html.unescape(text) for text in re.findall(r"<mark>(.*?)</mark>", page, re.DOTALL)]
    assert marked == ["Marked", escape_controls(f"{EVIL}<|im_end|>"), "b<|im_end|>"]


def test_preview_needs_no_weights(tiny, config_file, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = config_file(base_model=str(bare), eval_share=0.1)
    done = run_program("jlora.data", "--config", file, "--rows", "2", "--config.system_prompt=Be brief.")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(
        r"training: 36 examples, [\d,]+ tokens, \d+% of them trained on; the longest example has \d+ tokens", lines[0]
    )
    assert lines[1].startswith("held out: 4 examples")
    assert re.search(
        r"On one device: 12 steps of 4 examples; batch shapes to compile: .* tokens; \d+\.\d% padding", done.stdout
    )
    assert sum(int(count) for count in re.findall(r"tokens  #* *(\d+)\n", done.stdout)) == 36
    assert "Showing 2 of 36 rows" in done.stdout
    assert done.stdout.count("<|im_start|>system\nBe brief.<|im_end|>\n") == 2
    assert len(re.findall(r"<\|im_start\|>assistant\n\[\[Under Article .*?<\|im_end\|>\]\]", done.stdout)) == 2
    assert not (tmp_path / "run").exists()


def test_terminal_output_is_coloured(config_file):
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


def test_html_option_writes_the_same_rows(config_file, tmp_path, capsys):
    page = tmp_path / "rows.html"
    program.main(["--config", str(config_file()), "--html", str(page), "--rows", "0"])
    said = capsys.readouterr().out
    assert f"Wrote {page}" in said and "<|im_start|>" not in said
    text = page.read_text(encoding="utf-8")
    assert text.count("<mark>Under Article") == 40
    bars = re.findall(r"^ *(\d+ to +\d+ tokens) +#* +(\d+)$", said, re.M)
    assert bars and all(re.search(rf">\s*{label}</th>.*>{count}</td>", text) for label, count in bars)
    assert all(html.escape(line) in text for line in said.splitlines()[:-1] if " tokens  " not in line)
    with pytest.raises(UserError, match=r"--html .*nowhere/x.html: .* is not a directory"):
        program.main(["--config", str(config_file()), "--html", str(tmp_path / "nowhere/x.html")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_seq_length": 60},
            r"longer than max_seq_length=60 tokens: .*Set max_seq_length=\d+, shorten them, or set overlong",
        ),
        ({"eval_data_dir": "SAME"}, r"40 held-out questions are also trained on"),
        ({"pii": "error", "train_data_dir": "PHONE"}, r"1 row contains personal data \(phone number in 1\)"),
        ({"base_model": "NO_END"}, "adds no end token after the answer"),
    ],
)
def test_preview_and_training_report_the_same_errors(config_file, tmp_path, tiny, pairs, changes, message):
    phone = tmp_path / "phone.txt"
    phone.write_text("User: Whom do I call?\nLawyer: Under Article 1, 13800138000.\n")
    no_end = tmp_path / "no-end"
    shutil.copytree(tiny, no_end)
    (no_end / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    places = {"SAME": str(pairs), "PHONE": str(phone), "NO_END": str(no_end)}
    file = config_file(**{key: places.get(value, value) for key, value in changes.items()})
    refusals = []
    for name in ("jlora.data", "jlora.train"):
        done = run_program(name, "--config", file)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        refusals.append(done.stderr[done.stderr.index("error: ") :])
    assert refusals[0] == refusals[1] and re.search(message, refusals[0])
    assert "13800138000" not in refusals[0]


def test_overlong_examples_are_reported(config_file, varied_pairs, capsys):
    for how, said in (("drop", "dropped"), ("truncate", "truncated"), ("split", "split")):
        file = config_file(train_data_dir=str(varied_pairs), max_seq_length=120, overlong=how)
        program.main(["--config", str(file), "--rows", "0"])
        out = capsys.readouterr().out
        assert re.search(rf"training: {said} \d+ of 40 examples longer than 120 tokens.*overlong={how}", out), out
        lengths = [int(n) for n in re.findall(r": (\d+) tokens, \d+ trained on", out)]
        assert max(lengths) <= 120 and len(lengths) == int(re.search(r"training: (\d+) examples", out)[1])
