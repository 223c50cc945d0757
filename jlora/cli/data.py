"""Shows what would be trained on, and stops where training would: `python -m jlora.data --config configs/law.py`.

Reads the data and the base's tokenizer, not its weights. `--html FILE` writes the same as a page.
"""

import sys
from pathlib import Path

from jlora.bases.resolve import resolve_base
from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.config.files import config_parser, load_config
from jlora.data import preview, summary
from jlora.data.chat import end_tokens, load_tokenizer
from jlora.models.families import read_config
from jlora.planning import pipeline


def main(argv: list[str]) -> None:
    """The command line."""
    parser = config_parser("jlora.data", "Shows the rows as the model will see them, and what of them is trained on.")
    parser.add_argument("--rows", type=int, default=10, metavar="N", help="rows to show (10); 0 shows all")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing the rows")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.rows < 0:
        parser.error(f"--rows {arguments.rows}: expected 0 or more")
    if arguments.html and not arguments.html.parent.is_dir():
        raise UserError(f"--html {arguments.html}: {arguments.html.parent} is not a directory")
    config = load_config(arguments.config, overrides)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    rows, held_out_rows = pipeline.read_rows(config, say)
    directory = resolve_base(config.base_model, config.revision, weights=False)
    tokenizer = load_tokenizer(directory, config.chat_template)
    ends = end_tokens(directory, tokenizer)
    examples = pipeline.read_examples(config, tokenizer, ends, rows, "training", say)
    held_out = pipeline.read_examples(config, tokenizer, ends, held_out_rows, "held out", say) if held_out_rows else []
    steps, batches, _ = pipeline.plan(config, read_config(directory), examples, held_out, devices=1)
    for line in summary.histogram(examples.sizes[:, 0]):
        say(line)
    say(f"on one device: {preview.batch_line(batches, steps)}")
    shown = [examples[i] for i in range(min(arguments.rows or len(examples), len(examples)))]
    say(f"{len(shown)} of {len(examples)} rows shown; --rows N shows more, --rows 0 all")
    if arguments.html:
        title = f"What {arguments.config} trains on"
        try:
            replace_text(arguments.html, preview.as_page(tokenizer, title, said, shown))
        except OSError as error:
            raise UserError(f"--html {arguments.html} cannot be written: {error.strerror}") from None
        print(f"written: {arguments.html}")
        return
    colour = sys.stdout.isatty()
    for example in shown:
        print(f"\n{preview.heading(example)}\n{preview.as_text(tokenizer, example, colour=colour)}")
