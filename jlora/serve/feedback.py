"""What users think of answers, kept for the next training.

`rows.jsonl` has conversations that `train_data_dir` reads: answers that were called good, and better answers that users
wrote. `pairs.jsonl` has a better and a worse answer to the same question, for training on preferences.
"""

import json
import os
from pathlib import Path
from typing import Any

from jlora.serve.openai_bodies import FeedbackBody

ROWS, PAIRS = "rows.jsonl", "pairs.jsonl"


def save_feedback(directory: Path, feedback: FeedbackBody) -> None:
    """Appends feedback to the files of a directory. What cannot be used for training is not kept.

    Raises:
      OSError: it cannot be written; the files are as before.
    """
    turns = [{"role": turn.role, "content": turn.message().content} for turn in feedback.messages]
    better = (feedback.better or "").strip()
    good = better or (feedback.answer if feedback.rating == "up" else "")
    directory.mkdir(parents=True, exist_ok=True)
    if better:
        _append(directory / PAIRS, {"prompt": turns, "chosen": better, "rejected": feedback.answer})
    if good:
        _append(directory / ROWS, {"messages": [*turns, {"role": "assistant", "content": good}]})


def _append(path: Path, row: dict[str, Any]) -> None:
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError("The disk is full.")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
