"""Reads text that already has the form of a chat template or of Markdown, such as ChatML, back to turns.

Only text that has this form from its first character to its last is read so; otherwise an error says where it ends.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from jlora.common.errors import UserError
from jlora.data.conversation import (
    ASSISTANT_NAMES,
    MAX_ROW,
    SYSTEM_NAMES,
    USER_NAMES,
    Message,
    ReaderNotes,
    Turn,
)
from jlora.data.readers.encoding import numbered_lines
from jlora.data.readers.source import Source
from jlora.data.readers.text_files import RULE, Row, make_row

CONTEXT = "context"  # the role of text that belongs to the question before it
ROLES = {
    **dict.fromkeys(SYSTEM_NAMES | {"system_prompt"}, "system"),
    **dict.fromkeys(USER_NAMES | {"instruction", "prompt", "inst", "指令", "提问"}, "user"),
    **dict.fromkeys(ASSISTANT_NAMES | {"response", "output", "model", "/inst", "回复", "输出", "答案"}, "assistant"),
    **dict.fromkeys({"input", "context", "输入", "上下文"}, CONTEXT),
}
ANY_ROLE = "|".join(sorted(map(re.escape, ROLES), key=len, reverse=True))
NAME = rf"(?P<role>{ANY_ROLE})[ \t]*\d*[ \t]*"  # such as "Question 1"
PERSON = r"(?:a|q|bot|model|client|patient|lawyer|doctor|advis[eo]r)"  # as a heading without a colon, hardly a role
BULLET, BOLD = r"(?:[-*+•]|\d+[.)])[ \t]+", r"(?:\*\*|__)"
HEADING = re.compile(r"\s*#{1,6}[ \t]+\S")
END_OF_TEXT = r"(?:</s>|<eos>|<\|endoftext\|>|<\|end_of_text\|>)"
BETWEEN_TURNS = re.compile(rf"(?:\s|{END_OF_TEXT}|<s>)*")
TOKENS = r"(?:(?:<s>|<bos>|<\|begin_of_text\|>)\s*)*"
PREAMBLE = r"(?:(?:Below is an instruction that|A chat between a curious) [^#\n]*?\.\s*(?=#|USER:|$))?"
OPENING = re.compile(rf"(?:\s*\n)?(?P<said>{TOKENS}{PREAMBLE})")  # what a template writes before the first turn
LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


class Style(NamedTuple):
    """A form of text with roles."""

    name: str
    header: re.Pattern[str]  # the beginning of a turn; its group `role` names the role
    end: re.Pattern[str]  # the end of a turn
    ends: str = ""  # the token that must end every turn but the last, if there must be one
    common: bool = False  # people write such words too, so only text with a question and an answer has this form


def _style(name: str, header: str, end: str, ends: str = "") -> Style:
    return Style(name, re.compile(header), re.compile(end), ends)


def _common(name: str, header: str, flags: int = re.MULTILINE | re.IGNORECASE) -> Style:
    return Style(name, re.compile(header, flags), re.compile(rf"{END_OF_TEXT}\s*\Z"), common=True)


VICUNA = _common("Vicuna's template", r"(?<![^\s>])(?P<role>USER|ASSISTANT):", 0)
HASHES = _common("### headings", rf"(?<!#)#{{2,6}}[ \t]*(?!{PERSON}[ \t]*$){NAME}(?:[:：]|$)")
BOLD_ROLES = _common(
    "bold roles", rf"^[ \t]*(?:{BULLET}|#+[ \t]+)?{BOLD}[ \t]*{NAME}(?:[:：][ \t]*{BOLD}|{BOLD}[ \t]*[:：])"
)
STYLES = (
    _style("ChatML", r"<\|im_start\|>(?P<role>[^\n<]*)(?:\n|\Z)", r"<\|im_end\|>", "<|im_end|>"),
    _style(
        "Llama 3's template",
        r"<\|(?:start_header_id|header_start)\|>(?P<role>[^\n<]*)<\|(?:end_header_id|header_end)\|>",
        r"<\|eot(?:_id)?\|>",
        "<|eot_id|>",
    ),
    _style("Llama 2's or Mistral's template", r"\[(?P<role>/?INST|SYSTEM_PROMPT)\]", r"</s>|\[/SYSTEM_PROMPT\]"),
    _style("Gemma's template", r"<start_of_turn>(?P<role>[^\n<]*)(?:\n|\Z)", r"<end_of_turn>", "<end_of_turn>"),
    _style("Zephyr's or Phi's template", r"<\|(?P<role>system|user|assistant)\|>", rf"{END_OF_TEXT}|<\|end\|>", "</s>"),
    VICUNA,
    HASHES,
    BOLD_ROLES,
    _common("a list of roles", rf"^[ \t]*{BULLET}{NAME}[:：]"),
)


class _FormEnds(Exception):
    """The text stops having the form of its style."""

    def __init__(self, at: int, expected: str) -> None:
        super().__init__(expected)
        self.at, self.expected = at, expected

    def message(self, style: Style, text: str) -> str:
        rest = text[self.at :].strip()[:40]
        where = f"from {rest!r} on it does not" if rest else "its end does not"
        advice = ", or set task_type=plain-text to read it as plain text" if style.common else ""
        return f"The text begins in the form of {style.name}, but {where}: Expected {self.expected}. Fix it{advice}."


def find_style(file: Source, head: list[str]) -> Style | None:
    """Returns the style of a text file from its first lines, of which headings are skipped; None if it has none.

    Raises:
      UserError: other lines precede headings or bold roles.
    """
    first = next((number for number, line in enumerate(head) if not HEADING.match(line) or _begins_turn(line)), 0)
    style = _style_of("\n".join(head[first:]))
    if style is VICUNA and head[first].lstrip().startswith("USER:") and len(VICUNA.header.findall(head[first])) < 2:
        return None  # lines that start with a role, which `read_text` reads
    later = next((number for number, line in enumerate(head) if number > first and _begins_turn(line)), 0)
    late = _style_of("\n".join(head[later:])) if later and style is None else None
    if late:
        raise UserError(
            f"{file}: The file begins with {head[0].strip()[:40]!r}, but later has the form of {late.name}. Remove the "
            "lines before it, or set task_type=plain-text for text without roles."
        )
    return style


def turns_of_text(text: str, where: str, notes: ReaderNotes, column: str) -> list[Turn]:
    """Returns the turns of a text that has the form of a style; none if it does not begin so.

    Raises:
      UserError: the text begins in this form, but does not keep it.
    """
    style = _style_of(text)
    if style is None:
        return []
    try:
        turns = [Turn(Message(role, content), where) for role, content, _ in _parse(style, text)]
    except _FormEnds as error:
        raise UserError(f"{where}: {error.message(style, text)}") from None
    notes.add(f"text in the form of {style.name}, read as turns", column)
    return turns


class _Block(NamedTuple):
    """Lines from a question, or from the opening of a text, to the line before the next."""

    after: str  # what precedes it: "rule", "blank", or "each" for nothing; or "opening" if it opens a text
    line: int
    gap: int  # how many blank lines, rules and headings precede it
    text: str


def read_markup(file: Source, encoding: str, style: Style, notes: ReaderNotes) -> Iterator[Row]:
    """Yields the rows of a text file in this style.

    The opening of a text (`<s>`, a system message) starts a row. So does a question after a line of `---` or, without
    such lines, after a blank line; or, without either and without openings, every question.
    """
    notes.add(f"text in the form of {style.name}, read as turns", file.name)
    found = {block.after for block in _blocks(file, encoding, style, ReaderNotes())}
    separator = next((kind for kind in ("rule", "blank", "opening") if kind in found), "each")
    row: _Block | None = None
    for block in _blocks(file, encoding, style, notes):
        if row and separator != "each" and block.after not in (separator, "opening"):
            row = row._replace(text=row.text + "\n" * block.gap + block.text)
            if len(row.text) > MAX_ROW:
                raise _too_long(file, row)
            continue
        if row:
            yield _row(file, style, row)
        if row and separator == "each":
            notes.add("every question starts a row, because no blank line separates rows", file.name)
        row = block
    if row:
        yield _row(file, style, row)


def _blocks(file: Source, encoding: str, style: Style, notes: ReaderNotes) -> Iterator[_Block]:
    block, last = _Block("", 0, 0, ""), "assistant"  # last: the role of the current turn
    lines: list[str] = []
    gap: list[str] = []
    size = 0
    for number, line in numbered_lines(file, encoding):
        opening = OPENING.match(line)
        assert opening is not None
        header = _header_at(style, line, opening.end())
        role = _role(header) if header else ""
        opens = bool(opening["said"]) or role == "system"
        if last == "assistant" and (opens or role == "user"):
            if lines:
                yield block._replace(text="".join(lines))
            between = "rule" if any(map(RULE.match, gap)) else "blank" if gap else "each"
            after = "opening" if opens else between if lines else "each"
            _note_titles(gap, notes)
            block, lines, gap, size, last = _Block(after, number, len(gap), ""), [line], [], 0, "opening"
        elif not line.strip() or RULE.match(line) or _is_title(style, line):
            gap.append(line)
        else:
            lines += [*gap, line]
            gap = []
        for turn in style.header.finditer(line):
            last = _role(turn)
        size += len(line)
        if size > MAX_ROW:
            raise _too_long(file, block)
    _note_titles(gap, notes)
    if lines:
        yield block._replace(text="".join(lines))


def _is_title(style: Style, line: str) -> bool:
    return style.common and bool(HEADING.match(line)) and not style.header.search(line)


def _note_titles(gap: list[str], notes: ReaderNotes) -> None:
    for line in filter(HEADING.match, gap):
        notes.add("headings between rows, left out", line.strip()[:40])


def _too_long(file: Source, block: _Block) -> UserError:
    return UserError(f"{file}:{block.line}: The row is longer than {MAX_ROW:,} characters. Split it into several.")


def _row(file: Source, style: Style, block: _Block) -> Row:
    def place(at: int) -> str:
        return f"{file}:{block.line + block.text.count(chr(10), 0, at)}"

    try:
        turns = [Turn(Message(role, content), place(at)) for role, content, at in _parse(style, block.text)]
    except _FormEnds as error:
        return UserError(f"{place(error.at)}: {error.message(style, block.text)}")
    return make_row(turns, f"{file}:{block.line}")


def _style_of(text: str) -> Style | None:
    opening = OPENING.match(text)
    assert opening is not None
    for style in STYLES:
        first = _header_at(style, text, opening.end())
        if first is None:
            continue
        roles = {_role(header) for header in style.header.finditer(text)} if style.common else set()
        if not style.common or (_role(first) in ("system", "user") and {"user", "assistant"} <= roles):
            return style
    return None


def _begins_turn(line: str) -> bool:
    return bool(_header_at(HASHES, line, 0) or _header_at(BOLD_ROLES, line, 0))


def _header_at(style: Style, text: str, at: int) -> re.Match[str] | None:
    """Returns the header that begins here or after spaces."""
    return style.header.match(text, at) or style.header.match(text, at + len(text[at:]) - len(text[at:].lstrip(" \t")))


def _role(header: re.Match[str]) -> str:
    return ROLES.get(header["role"].strip().lower(), "")


def _parse(style: Style, text: str) -> list[tuple[str, str, int]]:
    """Returns the role, content and offset of each turn.

    Raises:
      _FormEnds: the text does not have the form of the style to its end.
    """
    opening = OPENING.match(text)
    assert opening is not None
    headers = list(style.header.finditer(text, opening.end()))
    if not headers or text[opening.end() : headers[0].start()].strip():
        raise _FormEnds(opening.end(), "the beginning of a turn")
    turns: list[tuple[str, str, int]] = []
    for header, after in zip(headers, [*headers[1:], None], strict=True):
        role, stop = _role(header), after.start() if after else len(text)
        end = style.end.search(text, header.end(), stop)
        content = text[header.end() : end.start() if end else stop]
        if not role:
            raise _FormEnds(header.start(), "one of the roles system, user and assistant")
        if end is None and after and style.ends:
            raise _FormEnds(stop, f"{style.ends} before it")
        if end and (tokens := BETWEEN_TURNS.match(text, end.end(), stop)) and tokens.end() < stop:
            raise _FormEnds(tokens.end(), "the beginning of a turn")
        if role == CONTEXT:
            if not turns or turns[-1][0] != "user":
                raise _FormEnds(header.start(), "a question before it")
            question = "\n".join(filter(None, (turns[-1][1].strip(), content.strip())))
            turns[-1] = ("user", question, turns[-1][2])
            continue
        if role == "user" and (both := LLAMA_2_SYSTEM.fullmatch(content)):
            turns.append(("system", both[1], header.start()))
            content = both[2]
        turns.append((role, content, header.start()))
    return turns
