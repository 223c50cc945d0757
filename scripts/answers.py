"""Counts the held-out answers that begin as the training answers do, for the base model and a run's adapter.

python scripts/answers.py --run output/law_lora --begins "Under Article"
"""

import argparse
import sys
from pathlib import Path

from jlora.cli.program import run_program
from jlora.data.conversation import ReadOptions
from jlora.data.readers import splits
from jlora.data.readers.files import read_conversations
from jlora.serve.loading import load_model
from jlora.training.checkpoint import read_record


def main(argv: list[str]) -> None:
    """Prints each question with both greedy answers, then the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the output_dir of a run")
    parser.add_argument("--begins", required=True, help="the first words of the training answers")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    arguments = parser.parse_args(argv)
    record = read_record(arguments.run, "--run")
    base = record["base"]["directory"]
    data, reading = record["data"], ReadOptions.from_config(record["config"])
    use = data.get("question_files", splits.TRAIN)
    rows = read_conversations(data["questions"], "the run's questions", reading, use=use)
    counts = {}
    for name, adapter in {"base": None, "adapter": arguments.run / "adapter"}.items():
        generator, adapters = load_model(base, {"adapter": adapter} if adapter else {})
        mixture, asked = adapters.select(list(adapters.places)), [row.messages[:1] for row in rows]
        answers = generator.answers([mixture] * len(rows), asked, max_new_tokens=arguments.max_new_tokens)
        counts[name] = sum(answer.startswith(arguments.begins) for answer in answers)
        for row, answer in zip(rows, answers, strict=True):
            print(f"{name} | {row.messages[0].content} | {answer!r}")
    for name, count in counts.items():
        print(f"{name}: {count} of {len(rows)} answers begin with {arguments.begins!r}")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
