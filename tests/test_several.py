"""Several adapters on one base model: switched, mixed in a batch, summed; chat in the terminal; output rules."""

import json
import logging
import re
import subprocess

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from programs import command, process_options, run_program
from small_adapters import SPECS, Alone

from jlora.adapters import combining, params
from jlora.adapters.peft_config import read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter
from jlora.cli import generate
from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.serve import loading
from jlora.serve.repl import Chat, side_by_side

ROWS = ["law", "style", "base", "short", "law"]
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [5, 6, 7], [11] * 70, [20, 21]]


@pytest.fixture(scope="module")
def together(small, places):
    """A generator, and the adapters that can be loaded together."""
    return loading.load_model(str(small), {name: places[name] for name in SPECS})


def alone(small, place, prompt):
    """Returns the last logits of a prompt with one adapter in its own form."""
    return Alone(small, place, len(prompt)).logits(prompt)[-1]


@pytest.mark.slow
def test_a_batch_with_mixed_adapters_equals_each_row_alone(small, places, together):
    generator, adapters = together
    mixtures = [adapters.select([name] if name in SPECS else []) for name in ROWS]
    got = generator.next_token_logits(mixtures, PROMPTS)
    want = np.stack([alone(small, places.get(name), prompt) for name, prompt in zip(ROWS, PROMPTS, strict=True)])
    assert np.abs(got - want).max() < 1e-5
    wrong = generator.next_token_logits(mixtures[-1:] + mixtures[:-1], PROMPTS)
    assert np.abs(wrong - want)[1:].max(axis=1).min() > 0.05  # the first row has the same adapter
    answers = generator.generate_batch(mixtures, PROMPTS, 8)
    for mixture, prompt, answer in zip(mixtures, PROMPTS, answers, strict=True):
        assert answer == list(generator.generate_tokens(mixture, prompt, 8))
    law = mixtures[0]
    drawn = generator.generate_batch([law] * 2, [PROMPTS[0]] * 2, 8, temperature=2.0, seed=3)
    one, other = (list(generator.generate_tokens(law, PROMPTS[0], 8, temperature=2.0, seed=seed)) for seed in (3, 4))
    assert drawn == [one, other] and one != other


@pytest.mark.slow
def test_a_finished_row_does_not_affect_the_others(together, monkeypatch):
    generator, adapters = together
    law, style = (adapters.select([name]) for name in ("law", "style"))
    first, second = (list(generator.generate_tokens(mixture, PROMPTS[0], 8)) for mixture in (law, style))
    end = next(token for token in first[1:] if token not in second)
    monkeypatch.setattr(generator, "ends", frozenset({end}))
    monkeypatch.setattr(generator, "_engine", None)  # the next one reads the end tokens
    answers = generator.generate_batch([law, style], [PROMPTS[0]] * 2, 8)
    assert answers == [first[: first.index(end)], second]


@pytest.mark.slow
def test_switching_and_mixing_compile_nothing(together, caplog):
    generator, adapters = together
    words = [[name] for name in SPECS] + [[], ["law=0.5", "style=-1"]]
    list(generator.generate_tokens(adapters.select(words[0]), PROMPTS[0], 4))
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        answers = [list(generator.generate_tokens(adapters.select(chosen), PROMPTS[0], 4)) for chosen in words]
        assert not [r.message for r in caplog.records if "ompil" in r.message]
        assert len(set(map(tuple, answers))) == 5
        jax.jit(lambda x: x * 3.25)(1.0)  # a compilation would have been detected
        assert [r.message for r in caplog.records if "ompil" in r.message]


@pytest.mark.slow
def test_a_sum_of_adapters_is_the_sum_of_their_deltas_in_peft(small, places, tmp_path):
    done = run_program(
        *("jlora.combine", "--adapters", f"{places['law']}=0.7", f"{places['style']}=-0.3", places["short"]),
        *("--output", tmp_path / "sum"),
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == f"Combined 3 adapters into one of rank 14: {tmp_path / 'sum'}\n"
    )  # 4 + 6 + 2 x 2, as PiSSA's is a difference
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, places["law"], "law")
    for name, place in {"style": places["style"], "short": places["short"], "sum": tmp_path / "sum"}.items():
        model.load_adapter(place, name)
    compared = 0
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight") or "sum" not in module.lora_A:
            continue
        weights = {"law": 0.7, "style": -0.3, "short": 1.0}
        want = sum(w * module.get_delta_weight(own) for own, w in weights.items() if own in module.lora_A)
        got = module.get_delta_weight("sum")
        assert torch.abs(got - want).max() < 1e-6 * max(1.0, float(torch.abs(got).max())), name
        compared += bool(torch.any(got != 0))
    assert compared == 3 * 3 + 2  # q, v and gate in three layers, down in two
    model.set_adapter("sum")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([PROMPTS[1]])).logits[0, -1].numpy()
    assert np.abs(theirs - alone(small, tmp_path / "sum", PROMPTS[1])).max() < 1e-4
    generator, adapters = loading.load_model(str(small), {name: places[name] for name in SPECS})
    mixed = adapters.select(["law=0.7", "style=-0.3", "short"])
    assert np.abs(generator.next_token_logits([mixed], [PROMPTS[1]])[0] - theirs).max() < 1e-4
    nothing = adapters.select(["law=1", "law=-1"])
    bare = alone(small, None, PROMPTS[1])
    assert np.abs(generator.next_token_logits([nothing], [PROMPTS[1]])[0] - bare).max() < 1e-5
    one, other = (
        run_program("jlora.generate", "--prompt", "Hi", "--max_new_tokens", 8, *arguments)
        for arguments in (
            ["--adapter", tmp_path / "sum"],
            [
                *(word for name in SPECS for word in ("--adapter", f"{name}={places[name]}")),
                *("--use", "law=0.7", "style=-0.3", "short"),
            ],
        )
    )
    assert one.returncode == 0 and one.stdout.strip() and one.stdout == other.stdout, one.stderr + other.stderr
    again = run_program("jlora.combine", "--adapters", places["law"], "--output", tmp_path / "sum")
    assert again.returncode == 2 and "exists, and jlora never overwrites" in again.stderr


def test_a_sum_of_one_is_that_adapter(small, places):
    spec = read_spec(places["law"], 3)
    _, shapes, _ = hf_loader.abstract_model(read_config(small), spec, FLOAT32_COMPUTE)
    adapter = read_adapter(places["law"], spec, shapes, tied=True)
    made, form = combining.combine([(adapter, spec)], [1.0])
    assert (form.rank, form.alpha) == (4, 4.0)
    for (_, mine), (_, theirs) in zip(params.modules(made), params.modules(adapter), strict=True):
        assert np.array_equal(mine["lora_A"], theirs["lora_A"])
        assert np.allclose(mine["lora_B"], 3.0 * theirs["lora_B"], atol=1e-7)


@pytest.mark.slow
def test_adapters_that_cannot_be_combined_are_refused(small, places, tmp_path):
    with pytest.raises(UserError, match=r"Adapter dora uses DoRA \(use_dora\), which is not a low-rank sum.*--merged"):
        loading.load_model(str(small), {"law": places["law"], "dora": places["dora"]})
    generator, adapters = loading.load_model(str(small), {"dora": places["dora"]})  # alone it works
    (got,) = generator.next_token_logits([adapters.select(["dora"])], [PROMPTS[1]])
    assert np.abs(got - alone(small, places["dora"], PROMPTS[1])).max() < 1e-5
    with pytest.raises(UserError, match="Adapter dora uses DoRA"):
        adapters.select(["dora=0.5"])
    for words, message in [
        (["lore"], "Unknown adapter 'lore'. Available adapters: dora."),
        (["dora=much"], "dora=much: Expected NAME, or NAME=WEIGHT with a number"),
        (["dora=nan"], "dora=nan: Expected NAME, or NAME=WEIGHT"),
    ]:
        with pytest.raises(UserError, match=message):
            adapters.select(words)
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", places["law"], other], check=True)
    (other / TEMPLATE).write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="Adapters law and other were trained with different chat templates"):
        loading.load_model(str(small), {"law": places["law"], "other": other})
    with pytest.raises(UserError, match=r"Duplicate name 'law'\. Name the adapters: --adapter NAME="):
        generate.adapters_by_name([str(places["law"]), f"law={places['style']}"])
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    done = run_program("jlora.combine", "--adapters", places["law"], other, "--output", tmp_path / "x")
    assert done.returncode == 2 and "The adapters name different base models" in done.stderr and "--base" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_chat_in_the_terminal(small, places, tmp_path):
    (tmp_path / "rules.yaml").write_text("- replace: '[a-z]'\n  with: '~'\n")
    typed = ["Hi", "/compare", "/adapter style", "Hi", "/adapter", "/adapter law=0.5 style=-1", "/off", "/compare Yes?"]
    typed += ["/adapter nobody", "/frob", "/new", "/compare", "/help", "", "你好"]
    arguments = ["--adapter", f"law={places['law']}", "--adapter", f"style={places['style']}", "--max_new_tokens", 6]
    done = subprocess.run(
        command("jlora.generate", "--chat", *arguments, "--output_rules", tmp_path / "rules.yaml"),
        **process_options(1),
        input="\n".join(typed),
        capture_output=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    start, hi, compare, style, again, listed, mixed, off, refused, nobody, frob, new, asked, help_text, *_ = (
        part.strip() for part in done.stdout.split("\n> ")
    )
    assert start == "Active adapter: law. Type /help for commands."
    assert hi and again and hi != again and not re.search("[a-z]", hi + again)
    assert re.match(r"law +\| base\n-+\+-+\n", compare) and not re.search("[a-z]", compare.split("\n", 1)[1])
    assert compare.split("\n")[2].split(" | ")[0].strip().startswith(hi[:5].strip())
    assert style == "Active adapter: style" and listed == "Available adapters: law, style. Active adapter: style"
    assert mixed == "Active adapter: law=0.5 style=-1" and off == "No active adapter: the base model answers"
    assert "The base model is active." in refused
    assert nobody == "error: Unknown adapter 'nobody'. Available adapters: law, style."
    assert frob == "error: Unknown command /frob. Type /help for commands."
    assert new == "Started a new conversation" and asked.startswith("error: There is no question to compare yet.")
    assert "/adapter NAME" in help_text and "Ctrl-D" in help_text


@pytest.mark.slow
def test_comparing_does_not_change_the_conversation(together):
    generator, adapters = together
    chat = Chat(generator, adapters, (), (Message("system", "Be brief."),), {"max_new_tokens": 4}, "law")
    asked = []
    pieces = generator.generate_text
    generator.generate_text = lambda mixture, messages, **options: (
        asked.append(messages) or pieces(mixture, messages, **options)
    )
    try:
        first = "".join(chat.reply("One?"))
        "".join(chat.reply("/compare Two?"))
        "".join(chat.reply("/adapter style"))
        "".join(chat.reply("Three?"))
    finally:
        del generator.generate_text
    assert [m.role for m in asked[1]] == ["system", "user", "assistant", "user"]
    assert [m.content for m in asked[1]] == ["Be brief.", "One?", first.strip(), "Three?"]


@pytest.mark.slow
def test_an_interrupted_answer_does_not_change_the_conversation(together, monkeypatch, capsys):
    generator, adapters = together
    chat = Chat(generator, adapters, (), (), {"max_new_tokens": 4}, "law")
    typed, whole = ["One?", "Two?", "/compare"], generator.generate_text

    def pieces(mixture, messages, **options):
        yield from whole(mixture, messages, **options)
        if messages[-1].content == "Two?":
            raise KeyboardInterrupt

    def read(prompt):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr(generator, "generate_text", pieces)
    monkeypatch.setattr("builtins.input", read)
    chat.run()
    assert "\nStopped. This turn is not part of the conversation.\n" in capsys.readouterr().out
    assert [message.content for message in chat._turns][::2] == ["One?"]


def test_columns_align_with_wide_characters():
    rows = list(
        side_by_side(
            ("law", "依据《劳动合同法》第十条，应当订立书面劳动合同。"), ("base", "Yes, it must be in writing."), 43
        )
    )
    assert rows[0] == "law" + " " * 17 + " | base"
    assert rows[2] == "依据《劳动合同法》第" + " | Yes, it must be in"
    assert rows[3] == "十条，应当订立书面劳" + " | writing."
    assert rows[4] == "动合同。" + " " * 12 + " |"
    assert len(list(side_by_side(("a", "x" * 50), ("b", ""), 43))) == 2 + 3
