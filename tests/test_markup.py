"""Text in the form of a chat template or of Markdown is read back as turns, if all of it has this form."""

import pytest
from test_layouts import contents, jsonl, read, roles

from jlora.common.errors import UserError

SYSTEM, ASKED, ANSWER = "Be kind.", "How long?\n\nIn days.", "Two weeks:\n- 14 days\n\n# or so"
AGAIN, SHORT = "Sure?", "Yes."
TURNS = [("system", SYSTEM), ("user", ASKED), ("assistant", ANSWER), ("user", AGAIN), ("assistant", SHORT)]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = ALPACA.replace("a task.", "a task, paired with an input that provides further context.")
CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
V1 = f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{ASKED} [/INST] {ANSWER} </s><s>[INST] {AGAIN} [/INST] {SHORT} </s>"


def joined(form, turns=TURNS):
    return "".join(form.format(role=role, text=text) for role, text in turns)


CONVERSATIONS = {  # a whole conversation of TURNS
    "ChatML": joined("<|im_start|>{role}\n{text}<|im_end|>\n"),
    "Llama 3": "<|begin_of_text|>" + joined("<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"),
    "Llama 4": "<|begin_of_text|>" + joined("<|header_start|>{role}<|header_end|>\n\n{text}<|eot|>"),
    "Llama 2": V1,
    "Mistral": V1.replace(f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n", "")
    .replace("<s>[", "[")
    .replace("[", f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][", 1),
    "Zephyr": joined("<|{role}|>\n{text}</s>\n"),
    "Phi": joined("<|{role}|>\n{text}<|end|>\n") + "<|endoftext|>",
}
WITHOUT_SYSTEM = {
    "Gemma": "<bos>" + joined("<start_of_turn>{role}\n{text}<end_of_turn>\n", TURNS[1:]).replace("assistant", "model"),
    "Vicuna": f"{CHAT} USER: {ASKED} ASSISTANT: {ANSWER}</s>USER: {AGAIN} ASSISTANT: {SHORT}</s>",
    "Guanaco": f"### Human: {ASKED}### Assistant: {ANSWER}### Human: {AGAIN}### Assistant: {SHORT}",
    "no last end": joined("<|im_start|>{role}\n{text}<|im_end|>\n", TURNS[1:]).removesuffix("<|im_end|>\n"),
}
ALL = [(name, text, [said for _, said in TURNS]) for name, text in CONVERSATIONS.items()]
ALL += [(name, text, [said for _, said in TURNS[1:]]) for name, text in WITHOUT_SYSTEM.items()]


@pytest.mark.parametrize(("name", "text", "expected"), ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_a_text_column_in_a_templates_form(file, name, text, expected):
    rows, (said,) = read(file(jsonl({"text": text}, {"text": f"  {text}\n"}), "rows.jsonl"))
    assert contents(rows) == [expected] * 2
    assert roles(rows)[0] == "s" * (len(expected) % 2) + "uaua"
    assert said.startswith("train_data_dir: text in the form of ") and said.endswith(", read as turns: text (2)")


@pytest.mark.parametrize(("name", "text", "expected"), ALL, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("rule", [False, True])
def test_a_text_file_in_a_templates_form(file, name, text, expected, rule):
    between, one = ("\n---\n", ASKED) if rule else ("\n\n", ASKED.replace("\n\n", " "))
    text = text.replace(ASKED, one)
    rows, said = read(file(between.join([text] * 3)))
    assert contents(rows) == [[said.replace(ASKED, one) for said in expected]] * 3
    assert "text in the form of" in said[0] and said[0].endswith("read as turns: rows.txt")


BLOCKS = "### Instruction:\nSay hi\n\n### Response:\nHi.\n\n### Instruction:\nSay bye\n\n### Response:\nBye.\n"
PAIRS = [["Say hi", "Hi."], ["Say bye", "Bye."]]
PREFIXES = {
    "blocks": BLOCKS,
    "blocks without blank lines": BLOCKS.replace("\n\n", "\n"),
    "blocks without colons": BLOCKS.replace(":", ""),
    "Alpaca": BLOCKS.replace("### Instruction", f"{ALPACA}\n\n### Instruction"),
    "questions": BLOCKS.replace("Instruction", "Question").replace("Response", "Answer").replace(":\n", ": "),
    "humans": BLOCKS.replace("Instruction", "Human").replace("Response", "Assistant"),
    "Chinese headings": BLOCKS.replace("Instruction:", "问题：").replace("Response:", "回答："),
    "bold": "**Q:** Say hi\n**A:** Hi.\n\n**Q:** Say bye\n**A:** Bye.\n",
    "bold, colon outside": "**Question**: Say hi\n\n**Answer**: Hi.\n\n**Question**: Say bye\n\n**Answer**: Bye.\n",
    "bold in Chinese": "**问：** Say hi\n**答：** Hi.\n**问：** Say bye\n**答：** Bye.\n",
    "bold with numbers": "**Question 1:** Say hi\n**Answer 1:** Hi.\n\n**Question 2:** Say bye\n**Answer 2:** Bye.\n",
    "bold in a list": "- **Q:** Say hi\n- **A:** Hi.\n\n* **Q:** Say bye\n* **A:** Bye.\n",
    "bold in a numbered list": "1. __Q:__ Say hi\n   __A:__ Hi.\n2. __Q:__ Say bye\n   __A:__ Bye.\n",
    "list": "- Q: Say hi\n- A: Hi.\n- Q: Say bye\n- A: Bye.\n",
    "bold with headings": "# FAQ\n\n**Q:** Say hi\n**A:** Hi.\n\n## More\n\n**Q:** Say bye\n**A:** Bye.\n",
    "bold with rules": "**Q:** Say hi\n\n**A:** Hi.\n\n---\n\n**Q:** Say bye\n\n**A:** Bye.\n\n---\n",
}


@pytest.mark.parametrize("name", PREFIXES)
def test_blocks_and_bold_roles_are_pairs(file, name):
    rows, said = read(file(PREFIXES[name], "rows.md"))
    assert contents(rows) == PAIRS
    assert "read as turns: rows.md" in said[0]
    assert ("headings between rows, left out: # FAQ, ## More" in " ".join(said)) == (name == "bold with headings")


def test_an_input_belongs_to_the_question(file):
    text = f"{ALPACA_INPUT}\n\n### Instruction:\nCount\n\n### Input:\na, b\n\n### Response:\nTwo\n\nin all."
    empty = text.replace("a, b", "").replace("Two", "None")
    rows, _ = read(file(f"{text}\n\n{empty}\n"))
    assert contents(rows) == [["Count\na, b", "Two\n\nin all."], ["Count", "None\n\nin all."]]
    assert contents(read(file(jsonl({"text": text}, {"text": empty}), "rows.jsonl"))[0]) == contents(rows)


CHATML = CONVERSATIONS["ChatML"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHATML.replace("<|im_end|>", "", 1), r"from '<\|im_start\|>user.*Expected <\|im_end\|> before it"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>\nOh.\n", 1), r"from 'Oh.*Expected the beginning of a turn"),
        (CHATML.replace("assistant", "robot"), r"from '<\|im_start\|>robot.*Expected one of the roles"),
        (CHATML.replace("assistant", "user"), "Expected user and assistant turns to alternate"),
        (CHATML + "<|im_start|>user\nAnd now?<|im_end|>", "This question has no answer: 'And now"),
        (CHATML + "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n", "The answer is empty"),
        (f"{V1}[INST] And?</s>", "has no answer: 'And"),
        (
            "### Question: How?\n### Input: x\n### Answer: So.\n### Input: y",
            r"'### Input: y.*a question before it",
        ),
        ("### Question: a?\n### Answer: b\n### Answer: c", "Expected user and assistant turns to alternate"),
    ],
)
def test_text_that_leaves_the_form_is_refused_where_it_does(file, text, message):
    for path in (file(jsonl({"text": text}), "rows.jsonl"), file(text)):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:")


def test_the_line_where_a_file_leaves_the_form(file):
    row = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n\n"
    with pytest.raises(UserError, match=r"rows.txt:10: The text begins in the form of ChatML, but from 'more'"):
        read(file(row + row[:-1] + "more\n\n" + row))
    rows, said = read(file(row + row[:-1] + "more\n\n" + row), bad_rows="drop")
    assert len(rows) == 2 and "dropped 1 of 3 rows" in said[0]


PROSE = [
    "The token <|im_start|> begins a turn, as in <|im_start|>user.",
    "In Llama 2, [INST] marks a question.",
    "**Note:** the shop is closed.\n**A:** see above.",
    "### Answer\nis a heading.\n### Question\nis another.",
    "## Patient\nJohn.\n## Doctor\nJane.",
    "USER: the person who uses it.",
    "- Question: nothing here answers it.",
]


@pytest.mark.parametrize("text", PROSE)
def test_text_about_markup_stays_text(file, text):
    rows, _ = read(file(jsonl({"text": text}), "rows.jsonl"))
    assert contents(rows) == [[text]] and roles(rows) == ["t"]


@pytest.mark.parametrize("name", ["bold", "questions", "Alpaca"])
def test_other_lines_before_bold_roles_are_refused(file, name):
    path = file(f"Staff handbook\n\n{PREFIXES[name]}")
    with pytest.raises(UserError, match=r"begins with 'Staff handbook', but later has the form of .*plain-text"):
        read(path)
    assert roles(read(path, task_type="plain-text")[0])[0] == "t"


def test_plain_text_keeps_its_markup(file):
    text = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    for path in (file(text), file(jsonl({"text": text}), "rows.jsonl")):
        assert contents(read(path, task_type="plain-text")[0]) == [[text]]


def test_prefixes_that_the_config_sets_come_first(file):
    given = {"user": "### Human", "assistant": "### Assistant"}
    rows, said = read(file("### Human: a?\n### Assistant: b\n"), role_prefixes=given)
    assert contents(rows) == [["a?", "b"]] and not said


def test_lines_of_vicunas_roles_are_lines_with_a_role(file):
    rows, said = read(file("USER: a?\nASSISTANT: b\n\nUSER: c?\nASSISTANT: d\n"))
    assert contents(rows) == [["a?", "b"], ["c?", "d"]] and not said
