"""The advice of every error message about rows as examples, and the chat template's part in it, is followed."""

import json
import shutil

import pytest
from advice import Case, follow, sites, unmet
from chat_templates import HERMES, R1, SMOLLM3
from test_layouts import jsonl
from test_masks import CHATML, CLOSING, MISTRAL

from jlora.config.schema import Config
from jlora.data import tokenizer
from jlora.planning.data_pipeline import read_examples, read_rows

ASK, SAY = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
LEARNED = ["b<|im_end|>"]
EXCEPTIONS = {"Change the turns": "of a prompt that the model is served with, not of a row"}


def turns(*said):
    return jsonl({"messages": list(said)})


ROWS = turns(ASK, SAY)
BASE = []  # the base model


@pytest.fixture(scope="module", autouse=True)
def base(tiny):
    BASE[:] = [tiny]


def trained(place, patch, rows=ROWS, template="", other="", vocabulary=10**6, model="", **settings):
    """Returns a function that reads rows as a run does, and returns the text that each example trains."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in (("rows.jsonl", rows), ("held.jsonl", other), ("template.jinja", template)):
        (place / name).write_text(content)
    settings["chat_template"] = settings.get("chat_template", str(place / "template.jinja") if template else "")
    if other:
        settings["eval_data_dir"] = str(place / "held.jsonl")
    config = Config(train_data_dir=str(place / "rows.jsonl"), **settings)

    def texts():
        patch.setenv("XDG_CACHE_HOME", str(place))
        patch.setattr(tokenizer, "find_excess", lambda template: "")  # a process of its own for each template
        loaded = tokenizer.load_tokenizer(model or BASE[0], config.chat_template, "2026-11-07", config.enable_thinking)
        ends = tokenizer.end_tokens(BASE[0], loaded)
        kept, _ = read_rows(config, lambda line: None)
        examples = read_examples(config, loaded, ends, kept, "training", vocabulary, lambda line: None)
        return [loaded.decode(example.tokens[example.loss_mask]) for example in examples]

    return texts


def case(found, advice, before, after, gives=LEARNED):
    """Returns rows and settings, of which some change."""

    def steps(place, patch):
        yield trained(place / "before", patch, **before)
        yield trained(place / "after", patch, **{**before, **after})

    return Case(found, advice, steps, gives)


def without_template(place, patch):
    model = shutil.copytree(BASE[0], place / "base", ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    given = json.loads((model / "tokenizer_config.json").read_text())
    given.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(given))
    yield trained(place / "before", patch, model=model)
    yield trained(place / "after", patch, model=model, chat_template="alpaca")


MUCH = " ".join("b" * 50)
LONG = turns(ASK, {**SAY, "content": MUCH})
NO_END = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
UPPER = CHATML.replace("m['content']", "m['content'] | upper")
THOUGHT = turns(ASK, {**SAY, "reasoning_content": "one"})
TWO = turns(ASK, {**SAY, "reasoning_content": "one"}, {"role": "user", "content": "c?"}, {**SAY, "content": "d"})
HALF = turns(ASK, SAY, {"role": "user", "content": "c?"}, {**SAY, "content": "d", "train": False})
SYSTEM = turns({"role": "system", "content": "Be kind."}, ASK, SAY)
CALL = turns(
    ASK, {"role": "assistant", "tool_calls": [{"name": "n", "arguments": {}}]}, {"role": "tool", "content": "1"}, SAY
)
CALLED = '<tool_call>\n{"name": "n", "arguments": {}}\n</tool_call><|im_end|>'
OPEN = CLOSING + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
ANSWERS = "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
REVERSED = "{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}"
CHAT = {"chat_template": "chatml"}
MANY = "".join(turns({**ASK, "content": f"{number}?"}, SAY) for number in range(20))
CASES = [
    case(
        "1 held-out question is also trained on",
        "Remove them from one side",
        {"other": ROWS},
        {"other": LONG.replace("a?", "z?")},
    ),
    case(
        "needs held-out rows", "Set eval_data_dir", {"early_stopping_patience": 1}, {"other": LONG.replace("a?", "z?")}
    ),
    case(
        "eval_share=0.001 leaves no held-out rows",
        "Choose another share",
        {"rows": MANY, "eval_share": 0.001},
        {"eval_share": 0.4},
        LEARNED * 6,
    ),
    case("eval_share=0.4 leaves no", "add rows", {"eval_share": 0.4}, {"rows": MANY}, LEARNED * 6),
    case(
        "1 example is longer than max_seq_length=60",
        "Set max_seq_length=95",
        {"rows": LONG, "max_seq_length": 60},
        {"max_seq_length": 95},
        [f"{MUCH}<|im_end|>"],
    ),
    case(
        "longer than max_seq_length=60",
        "set overlong to truncate, drop or split",
        {"rows": LONG, "max_seq_length": 60},
        {"overlong": "truncate"},
        [MUCH[:33]],
    ),
    case(
        "No examples are left",
        "Set a larger max_seq_length",
        {"max_seq_length": 5, "overlong": "drop"},
        {"max_seq_length": 50},
    ),
    case(
        "marked not to be learned, but train_on=all",
        "Set train_on=assistant",
        {"rows": HALF, "train_on": "all"},
        {"train_on": "assistant"},
    ),
    case(
        "rejects this conversation: Only user",
        "Remove the row",
        {"rows": SYSTEM + ROWS, "template": MISTRAL},
        {"rows": ROWS},
    ),
    case(
        "rejects this conversation: Only user",
        "set chat_template to a template that takes it",
        {"rows": SYSTEM, "template": MISTRAL},
        CHAT,
    ),
    case("The chat template is broken, line 1", "set chat_template to a template", {"template": "{% for %}"}, CHAT),
    case(
        "contains '<.im_end.>', a special token",
        "Remove it from the text",
        {"rows": ROWS.replace("a?", "a<|im_end|>")},
        {"rows": ROWS},
    ),
    case("adds no end token", "set chat_template", {"template": NO_END}, CHAT),
    case("adds no end token", "Fix the template", {"template": NO_END}, {"template": CHATML}),
    case(
        "become one token",
        "Remove the space at the end of the prompt",
        {"template": OPEN},
        {"template": OPEN.replace("'assistant: '", "'assistant:'")},
        [" b<|im_end|>"],
    ),
    case(
        "starts with '<.im_start.>' twice",
        "Remove one from the chat template",
        {"template": "{{ bos_token }}" + CHATML},
        {"template": CHATML},
    ),
    case("has no trainable tokens", "remove train_on", {"rows": HALF, "train_on": "last"}, {"train_on": "assistant"}),
    case(
        "Every token of this example",
        "Set train_on=all if this is intended",
        {"template": ANSWERS},
        {"train_on": "all"},
    ),
    case(
        "has reasoning, but enable_thinking=false",
        "Set enable_thinking=auto",
        {"rows": THOUGHT, "enable_thinking": "false"},
        {"enable_thinking": "auto"},
        ["<think>\none\n</think>\n\nb<|im_end|>"],
    ),
    case(
        "has reasoning, but enable_thinking=false",
        "remove the reasoning",
        {"rows": THOUGHT, "enable_thinking": "false"},
        {"rows": ROWS},
    ),
    case(
        "so train_on=all cannot train it",
        "Remove train_on",
        {"rows": TWO, "template": R1, "train_on": "all"},
        {"train_on": "assistant"},
        ["one\n</think>\n\nb<|im_end|>", "\n</think>\n\nd<|im_end|>"],
    ),
    case(
        "where the prompt of the served",
        "set chat_template to one that only appends turns",
        {"template": REVERSED},
        CHAT,
    ),
    case("rewrites the answer", "Fix the template", {"template": UPPER}, {"template": CHATML}),
    case("rewrites the answer", "set chat_template", {"template": UPPER}, CHAT),
    case(
        "has no place for calls of tools", "Remove the row", {"rows": CALL + ROWS, "template": SMOLLM3}, {"rows": ROWS}
    ),
    case(
        "has no place for calls of tools",
        "set chat_template to a template that takes it",
        {"rows": CALL, "template": SMOLLM3},
        {"template": HERMES},
        [f"{CALLED}b<|im_end|>"],
    ),
    case(
        "has id .*, but the base model embeds only ids below 4095",
        "Remove the token from the text",
        {"rows": ROWS.replace("b", "b rise"), "vocabulary": 4095},
        {"rows": ROWS},
    ),
    Case("has no chat template", "chat_template=alpaca", without_template, LEARNED),
]
FILES = "held_out_split length_limit loss_mask answer_text chat_template".split()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.found[:40]}-{case.advice[:30]}")
def test_advice_is_followed(case, tmp_path, monkeypatch):
    follow(case, tmp_path, monkeypatch)


def test_every_message_about_examples_has_a_case(tmp_path):
    found = sites(f"data/{name}.py" for name in FILES)
    found |= sites(["data/tokenizer.py"], ["check_embedded"]) | sites(["planning/data_pipeline.py"], ["read_rows"])
    assert not unmet(CASES, found, EXCEPTIONS, tmp_path)
