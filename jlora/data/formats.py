"""Files -> conversations. Nothing about tokens.

Read today: text with role prefixes (`.txt`) and JSON lines (`.jsonl`) of `instruction`/`input`/`output` or `messages`.
"""

import hashlib
import json
import re
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
PREFIX = re.compile(r"^\s*([^\W\d_][\w -]{0,19}?)\s*[:：]\s*(.*)$", re.DOTALL)


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
    """The files that hold the rows; hidden files and `.md` notes are passed over."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{key}={path}: no such file or directory")
    if root.is_file():
        return [root]
    files = sorted(f for f in root.rglob("*") if f.is_file() and not f.name.startswith(".") and f.suffix != ".md")
    if not files:
        raise UserError(f"{key}={path}: the directory is empty; expected .txt or .jsonl files")
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
    if file.suffix not in readers:
        raise UserError(f"{file}: expected a .txt or .jsonl file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    return readers[file.suffix](file, text)


def _from_text(file: Path, text: str) -> list[Conversation]:
    """`User: ...` / `Lawyer: ...`; an answer goes on until the next prefix, blank lines included."""
    lines = text.splitlines()
    roles = _find_roles(file, lines)
    conversations: list[Conversation] = []
    turns: list[tuple[str, int, list[str]]] = []  # role, line number, text

    def finish() -> None:
        if turns:
            conversations.append(_pair(file, turns))
            turns.clear()

    for number, line in enumerate(lines, start=1):
        match = PREFIX.match(line)
        role = roles.get(match[1].lower()) if match else None
        if match and role:
            if role == "system" or (role == "user" and turns and turns[-1][0] != "system"):
                finish()
            turns.append((role, number, [match[2]]))
        elif turns:
            turns[-1][2].append(line)
        elif line.strip():
            raise UserError(f"{file}:{number}: expected a line that begins with a role, as in `User: ...`")
    finish()
    return conversations


def _find_roles(file: Path, lines: list[str]) -> dict[str, str]:
    """Which prefix is whose: known names, else the first prefix asks and the next one answers."""
    found = [(m[1].lower(), i) for i, line in enumerate(lines, 1) if (m := PREFIX.match(line))]
    names = list(dict.fromkeys(name for name, _ in found))
    roles = {name: "system" for name in names if name in SYSTEM_NAMES}
    rest = [name for name in names if name not in roles]
    users = [name for name in rest if name in USER_NAMES] or rest[:1]
    rest = [name for name in rest if name not in users]
    assistants = [name for name in rest if name in ASSISTANT_NAMES] or rest[:1]
    if not users or not assistants:
        raise UserError(
            f"{file}: found {', '.join(names) or 'no role prefix'}; "
            "expected lines that begin with two roles, as in `User: ...` and `Lawyer: ...`"
        )
    return {**roles, **dict.fromkeys(users, "user"), **dict.fromkeys(assistants, "assistant")}


def _pair(file: Path, turns: list[tuple[str, int, list[str]]]) -> Conversation:
    first = turns[0][1]
    messages = tuple(Message(role, "\n".join(said).strip()) for role, _, said in turns)
    spoken = [message.role for message in messages if message.role != "system"]
    if spoken == ["user"]:
        raise UserError(f"{file}:{first}: this question has no answer: {messages[-1].content[:60]!r}")
    if spoken == ["assistant"]:
        raise UserError(f"{file}:{first}: this answer has no question before it: {messages[-1].content[:60]!r}")
    if spoken != ["user", "assistant"]:
        raise UserError(f"{file}:{first}: expected one question and one answer, got {', '.join(spoken)}")
    for message, (role, line, _) in zip(messages, turns, strict=True):
        if not message.content:
            raise UserError(f"{file}:{line}: the {'answer' if role == 'assistant' else 'question'} is empty")
    return Conversation(messages, f"{file}:{first}")


def _from_json_lines(file: Path, text: str) -> list[Conversation]:
    return list(_json_rows(file, text))


def _json_rows(file: Path, text: str) -> Iterator[Conversation]:
    for number, line in enumerate(text.split("\n"), start=1):
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
    if "messages" not in row:
        question = "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        row = {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": row.get("output") or ""},
            ],
            "keys": sorted(row),
        }
        if not question or not row["messages"][1]["content"]:
            raise UserError(f"{where}: expected instruction and output, or messages; got {', '.join(row['keys'])}")
    messages = []
    for turn in row["messages"] if isinstance(row["messages"], list) else [row["messages"]]:
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
