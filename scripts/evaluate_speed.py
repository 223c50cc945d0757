"""Compares how fast the answers of an evaluation are generated: by jlora, by PEFT one by one, and by PEFT in batches.

python scripts/evaluate_speed.py --adapter output/law_lora/adapter [--rows 32] [--rounds 3]

All answer the same held-out questions greedily, half of them as the base model and half with the adapter, with the same
limits of tokens. They take turns, and the median of the rounds counts. A token is one that an answer contains.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers

from jlora import load_model
from jlora.adapters.peft_config import base_of
from jlora.bases.resolve import resolve_base
from jlora.data.readers.files import read_conversations
from jlora.evaluation.answers import Question, ask, kept
from jlora.evaluation.evaluate import held_out_questions
from jlora.evaluation.journal import Journal
from jlora.evaluation.subjects import Subjects, subjects_of

BATCH = 32  # answers at a time, as jlora has them


def with_jlora(subjects: Subjects, questions: list[Question]) -> int:
    """Answers all questions with every model; returns the number of tokens."""
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory) / "answers.jsonl", {})
        ask(subjects, questions, journal, "jlora")
        names = subjects.mixtures
        return sum(len(kept(subjects, journal, question, name).tokens) for question in questions for name in names)


class Peft:
    """The same models in PyTorch."""

    def __init__(self, base: Path, adapter: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = peft.PeftModel.from_pretrained(model, adapter).eval()
        self._pad = transformers.AutoTokenizer.from_pretrained(base).pad_token_id or 0

    def answer(self, questions: list[Question], batch: int) -> int:
        """Answers all questions with and without the adapter, `batch` at a time; returns the number of tokens."""
        ends = self._model.generation_config.eos_token_id
        count = 0
        by_length = sorted(questions, key=lambda question: len(question.prompt))
        for start in range(0, len(questions), batch):
            some = by_length[start : start + batch]
            longest = max(len(question.prompt) for question in some)
            ids = torch.tensor([[self._pad] * (longest - len(q.prompt)) + q.prompt for q in some])
            seen = torch.tensor([[0] * (longest - len(q.prompt)) + [1] * len(q.prompt) for q in some])
            limit = max(question.max_new_tokens for question in some)
            options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": self._pad}
            for use in (True, False):
                with torch.no_grad():
                    if use:
                        made = self._model.generate(input_ids=ids, attention_mask=seen, **options)
                    else:
                        with self._model.disable_adapter():
                            made = self._model.generate(input_ids=ids, attention_mask=seen, **options)
                for question, row in zip(some, made[:, longest:].tolist(), strict=True):
                    answer = row[: question.max_new_tokens]
                    stops = [answer.index(end) for end in ([ends] if isinstance(ends, int) else ends) if end in answer]
                    count += min(stops, default=len(answer))
        return count


def main() -> None:
    """Prints a table of tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--data", default="data/law_eval_en")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    base = resolve_base(*base_of(arguments.adapter))
    subjects = subjects_of(load_model(str(base), {"law": arguments.adapter}).generator)
    rows = read_conversations(arguments.data, "--data")[: arguments.rows]
    questions = held_out_questions(subjects.generator.tokenizer, rows)
    torch_model = Peft(base, arguments.adapter)
    ways: dict[str, Callable[[], int]] = {
        "jlora": lambda: with_jlora(subjects, questions),
        "PEFT, one by one": lambda: torch_model.answer(questions, 1),
        f"PEFT, {BATCH} at a time": lambda: torch_model.answer(questions, BATCH),
    }
    with_jlora(subjects, questions[:BATCH])  # compiles
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(arguments.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            speeds[name].append(count / (time.perf_counter() - start))
            print(f"round {round_number + 1}, {name}: {count} tokens, {speeds[name][-1]:.1f} tokens/s", flush=True)
    own = statistics.median(speeds["jlora"])
    print("\n| | tokens/s | jlora is faster by |\n|---|---:|---:|")
    for name, found in speeds.items():
        print(f"| {name} | {statistics.median(found):.1f} | {own / statistics.median(found):.2f} x |")


if __name__ == "__main__":
    main()
