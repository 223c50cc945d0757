"""What users think of answers, kept for the next training.

`rows.jsonl` has conversations that `train_data_dir` reads: answers that were called good, and better answers that users
wrote. `pairs.jsonl` has a better and a worse answer to the same question, for training on preferences.
"""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from jlora.serve.openai_bodies import FeedbackBody

ROWS, PAIRS = "rows.jsonl", "pairs.jsonl"
_writing = threading.Lock()  # a file that is made shorter again must not lose what another request has written


def save_feedback(directory: Path, feedback: FeedbackBody) -> None:
    """Appends feedback to the files of a directory; a bad rating without a better answer is not kept.

    Raises:
      OSError: it cannot be written; the files are as before.
    """
    turns = [{"role": turn.role, "content": turn.message().content} for turn in feedback.messages]
    better = (feedback.better or "").strip()
    good = better or (feedback.answer if feedback.rating == "up" else "")
    rows: dict[str, dict[str, Any]] = {}
    if better:
        rows[PAIRS] = {"prompt": turns, "chosen": better, "rejected": feedback.answer}
    if good:
        rows[ROWS] = {"messages": [*turns, {"role": "assistant", "content": good}]}
    directory.mkdir(parents=True, exist_ok=True)
    with _writing, contextlib.ExitStack() as undo:
        for name, row in rows.items():
            _append(directory / name, (json.dumps(row, ensure_ascii=False) + "\n").encode(), undo)
        undo.pop_all()


def _append(path: Path, line: bytes, undo: contextlib.ExitStack) -> None:
    """Appends a line; `undo` makes the file as long as it was."""
    with path.open("ab", buffering=0) as file:
        undo.callback(os.truncate, path, os.fstat(file.fileno()).st_size)
        if file.write(line) != len(line):
            raise OSError("The disk is full.")
        os.fsync(file.fileno())
