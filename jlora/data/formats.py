"""Files -> conversations. Nothing about tokens.

Read today: text with role prefixes (`.txt`) and JSON lines (`.jsonl`) of `instruction`/`input`/`output` or `messages`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.errors import UserError

ROLES = ("system", "user", "assistant")
USER_NAMES = {"用户", "问", "问题", "客户", "患者", "user", "question", "q", "human", "client", "patient"}
ASSISTANT_NAMES = {
    *("律师", "答", "回答", "助手", "医生", "顾问"),
    *("lawyer", "answer", "a", "assistant", "doctor", "advisor", "adviser", "bot"),
}
SYSTEM_NAMES = {"系统", "system"}
PREFIX = re.compile(r"^\s*([^\W\d_][\w -]{0,19}?)\s*[:：](?!//)\s*(.*)$", re.DOTALL)
NEW_LINE = re.compile(r"\r\n|\r|\n")
SKIPPED = {"Thumbs.db", "desktop.ini"}
# Keys of a JSON row that speak, and are not read yet: dropping them would change what is trained on.
UNREAD_KEYS = {
    *("system", "history", "context", "conversations", "conversation", "dialog", "dialogue"),
    *("prompt", "completion", "question", "answer", "query", "response", "chosen", "rejected"),
}


@dataclass(frozen=True)
class Message:
    """One turn: who says it ("system", "user" or "assistant") and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One example: its turns, the last of them the assistant's, and where it stands (`file:line`)."""

    messages: tuple[Message, ...]
    where: str


def read_conversations(path: str, key: str) -> list[Conversation]:
    """All conversations of a file, or of a directory's files in the order of their names.

    Args:
      path: the file or directory.
      key: the config key that named it, for messages.

    Raises:
      UserError: nothing there, an unknown kind of file, or a row that cannot be used, by file and line.
    """
    conversations = [row for file in data_files(path, key) for row in read_file(file)]
    if not conversations:
        raise UserError(f"{key}={path}: no question-answer pairs in it")
    return conversations


def data_files(path: str, key: str) -> list[Path]:
    """The files that hold the rows; what is hidden, and `.md` notes, are passed over."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{key}={path}: no such file or directory")
    if root.is_file():
        return [root]
    parts = [path for path in root.rglob("*") if path.is_file() and path.name not in SKIPPED]
    shown = [path for path in parts if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    files = sorted(path for path in shown if path.suffix.lower() != ".md")
    if not files:
        raise UserError(f"{key}={path}: no .txt or .jsonl file in this directory")
    return files


def hash_files(path: str, key: str) -> str:
    """sha256 over the files' names and bytes: the same hash, the same data."""
    digest = hashlib.sha256()
    for file in data_files(path, key):
        content = file.read_bytes()
        digest.update(f"{file.name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_file(file: Path) -> list[Conversation]:
    """The conversations of one file."""
    readers = {".txt": _from_text, ".jsonl": _from_json_lines}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file}: expected a .txt or .jsonl file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not UTF-8 (is it GB18030 or UTF-16?): save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    return readers[file.suffix.lower()](file, text)


def _from_text(file: Path, text: str) -> list[Conversation]:
    """`User: ...` / `Lawyer: ...`; an answer goes on until the next prefix, blank lines included."""
    lines = NEW_LINE.split(text)
    roles = _find_roles(file, lines)
    conversations: list[Conversation] = []
    turns: list[tuple[str, int, list[str]]] = []  # role, line number, text

    def finish() -> None:
        if turns:
            conversations.append(_pair(file, turns))
            turns.clear()

    for number, line in enumerate(lines, start=1):
        role = roles.get(prefix_of(line))
        if role:
            if role == "system" or (role == "user" and turns and turns[-1][0] != "system"):
                finish()
            match = PREFIX.match(line)
            assert match is not None
            turns.append((role, number, [match[2]]))
        elif turns:
            turns[-1][2].append(line)
    finish()
    return conversations


def prefix_of(line: str) -> str:
    """The name before a line's first colon, without case and number (`问1：` is 问); "" where there is none."""
    match = PREFIX.match(line)
    return match[1].lower().rstrip("0123456789 ") if match else ""


def _find_roles(file: Path, lines: list[str]) -> dict[str, str]:
    """Which prefix is whose. The first line's asks; the one that every question is followed by answers.

    Raises:
      UserError: that cannot be told for sure.
    """
    first = next(number for number, line in enumerate(lines, start=1) if line.strip())
    names = [(name, number) for number, line in enumerate(lines, start=1) if (name := prefix_of(line))]
    roles = {name: "system" for name, _ in names if name in SYSTEM_NAMES}
    speakers = [(name, number) for name, number in names if name not in roles]
    if not names or names[0][1] != first:
        raise UserError(
            f"{file}:{first}: expected a line that begins with a role, as in `User: ...`; got {lines[first - 1][:60]!r}"
        )
    asks = speakers[0][0] if speakers else ""
    if asks in ASSISTANT_NAMES:
        raise UserError(f"{file}:{first}: this answer has no question before it: {lines[first - 1][:60]!r}")
    followers: list[list[str]] = []  # after each question, the other prefixes up to the next
    for name, _ in speakers:
        if name == asks:
            followers.append([])
        elif name not in followers[-1]:
            followers[-1].append(name)
    counts = Counter(name for after in followers for name in after)
    often = [name for name, count in counts.items() if count == max(counts.values())]
    likely = [name for name in often if name in ASSISTANT_NAMES and len(name) > 1] or often
    others = [(name, number) for name, number in speakers if name in USER_NAMES - {asks} and len(name) > 1]
    if len(likely) != 1 or len(others) > 1:
        found = ", ".join(f"{name} ({count})" for name, count in Counter(name for name, _ in speakers).most_common(6))
        raise UserError(
            f"{file}: which two prefixes are the roles? Lines begin with {found or 'none'}; expected one that asks, in "
            "the first line, and one that answers. Rename or remove the others, or use .jsonl"
        )
    return {**roles, asks: "user", likely[0]: "assistant"}


def _pair(file: Path, turns: list[tuple[str, int, list[str]]]) -> Conversation:
    first = turns[0][1]
    messages = tuple(Message(role, "\n".join(said).strip()) for role, _, said in turns)
    spoken = [message.role for message in messages if message.role != "system"]
    if spoken == ["user"]:
        raise UserError(f"{file}:{first}: this question has no answer: {messages[-1].content[:60]!r}")
    if spoken != ["user", "assistant"]:
        raise UserError(f"{file}:{first}: expected one question and one answer, got {', '.join(spoken)}")
    for message, (role, line, _) in zip(messages, turns, strict=True):
        if not message.content:
            raise UserError(f"{file}:{line}: the {'answer' if role == 'assistant' else 'question'} is empty")
    return Conversation(messages, f"{file}:{first}")


def _from_json_lines(file: Path, text: str) -> list[Conversation]:
    return list(_json_rows(file, text))


def _json_rows(file: Path, text: str) -> Iterator[Conversation]:
    for number, line in enumerate(NEW_LINE.split(text), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {type(row).__name__}")
        yield Conversation(_messages(row, where), where)


def _messages(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    keys = ", ".join(sorted(row))
    if unread := sorted(UNREAD_KEYS & row.keys()):
        raise UserError(f"{where}: {unread[0]!r} is not read; expected instruction and output, or messages; got {keys}")
    if "messages" in row and "instruction" in row:
        raise UserError(f"{where}: has both messages and instruction: keep one of them")
    turns = row["messages"] if "messages" in row else _instruction(row, where, keys)
    messages = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise UserError(f"{where}: a message needs a role ({', '.join(ROLES)}) and a text content; got {turn!r}")
        if not turn["content"].strip():
            raise UserError(f"{where}: the {turn['role']}'s message is empty")
        messages.append(Message(turn["role"], turn["content"].strip()))
    roles = [message.role for message in messages]
    start = roles[:1] == ["system"]
    if roles[start:] != ["user", "assistant"] * (len(roles[start:]) // 2) or len(roles) == start:
        raise UserError(f"{where}: expected user and assistant in turn, the assistant last; got {', '.join(roles)}")
    return tuple(messages)


def _instruction(row: dict[str, Any], where: str, keys: str) -> list[dict[str, str]]:
    """instruction, input (may be left out) and output as a question and an answer."""
    if not {"instruction", "output"} <= row.keys():
        raise UserError(f"{where}: expected instruction and output, or messages; got {keys}")
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: {key} is {row[key]!r}; expected text")
    question = "\n".join(part for key in ("instruction", "input") if (part := row.get(key, "").strip()))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
