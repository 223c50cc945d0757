"""`jlora data`: previews the training data, and stops at any error in it that would stop training.

    jlora data --config configs/law.py

It reads the data and the base model's tokenizer, not its weights. `--html FILE` writes the preview as a page.
"""

import sys

from jlora.bases.resolve import resolve_base
from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.common.paths import user_path
from jlora.common.plural import plural
from jlora.config.files import config_parser, load_config
from jlora.data import preview
from jlora.data.examples import Example, SizedExamples
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.models.families import read_config, read_context
from jlora.planning import data_pipeline


def main(argv: list[str]) -> None:
    """Runs `jlora data` with these arguments."""
    parser = config_parser("data", "Shows rows as the model sees them, with the tokens that are trained on.")
    parser.add_argument("--rows", type=int, default=10, metavar="N", help="number of rows to show (10); 0 shows all")
    parser.add_argument(
        "--html", type=user_path, metavar="FILE", help="write an HTML page instead of printing the rows"
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.rows < 0:
        parser.error(f"--rows {arguments.rows}: Expected 0 or more.")
    if arguments.html and not arguments.html.parent.is_dir():
        raise UserError(f"--html {arguments.html}: {arguments.html.parent} is not a directory.")
    config = load_config(arguments.config, overrides)
    summary: list[str] = []

    def log(line: str) -> None:
        summary.append(line)
        print(line, flush=True)

    rows, held_out_rows = data_pipeline.read_rows(config, log)
    directory = resolve_base(config.base_model, config.revision, weights=False)
    tokenizer = load_tokenizer(directory, config.chat_template, config.chat_date)
    config = data_pipeline.fix_template_settings(config, tokenizer, rows, log)
    model = data_pipeline.with_new_tokens(config, read_config(directory), tokenizer)
    ends = end_tokens(directory, tokenizer)
    examples = data_pipeline.read_examples(config, tokenizer, ends, rows, "training", model.vocab_size, log)
    held_out: SizedExamples | list[Example] = []
    if held_out_rows:
        held_out = data_pipeline.read_examples(
            config, tokenizer, ends, held_out_rows, "held out", model.vocab_size, log
        )
    if warning := data_pipeline.context_warning(read_context(directory), [examples, held_out]):
        log(warning)
    steps, batches, _ = data_pipeline.make_run_batches(config, model, examples, held_out, devices=1)
    for line in preview.length_histogram(examples.sizes[:, 0]):
        print(line, flush=True)
    log(f"On one device: {preview.batch_summary(batches, steps)}")
    shown = [examples[i] for i in range(min(arguments.rows or len(examples), len(examples)))]
    log(f"Showing {len(shown)} of {plural(len(examples), 'row')}; --rows N shows more, --rows 0 all")
    if arguments.html:
        title = f"Training data of {arguments.config}"
        try:
            replace_text(arguments.html, preview.as_html(tokenizer, title, summary, examples.sizes[:, 0], shown))
        except OSError as error:
            raise UserError(f"--html {arguments.html} cannot be written: {error.strerror}.") from None
        print(f"Wrote {arguments.html}")
        return
    color = sys.stdout.isatty()
    for example in shown:
        print(f"\n{preview.example_heading(example)}")
        print(preview.as_text(tokenizer, example, color=color), file=getattr(sys.stdout, "unescaped", sys.stdout))
