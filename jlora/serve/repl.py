"""Chat in the terminal: switch and mix adapters, and compare them with the base model."""

import importlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jlora.adapters.combining import AdapterSet
from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.serve.generator import Generator
from jlora.serve.output_rules import Rules, filtered

HELP = """\
/adapter NAME            answer with this adapter; /adapter alone lists the adapters
/adapter A=0.7 B=-0.3    answer with a weighted sum of adapters; a negative weight subtracts one
/off                     answer with the base model alone
/compare [QUESTION]      show the answers of the adapter and the base model to QUESTION, or to the last question
/new                     start a new conversation
/help                    show this help
Ctrl-C stops an answer; Ctrl-D (end of input) quits. Everything else is sent to the model."""
BASE = "base"  # the column title of the base model


class Chat:
    """One conversation.

    Args:
      system: the turns before the conversation.
      options: for `Generator.generate_text`.
      use: what to start with, as words for `AdapterSet.select`; "": the base model alone.
    """

    def __init__(
        self,
        generator: Generator,
        adapters: AdapterSet,
        rules: Rules,
        system: tuple[Message, ...],
        options: Mapping[str, Any],
        use: str,
    ) -> None:
        self._generator, self._adapters, self._rules, self._options = generator, adapters, rules, options
        self._system = self._turns = system
        self._use, self._mixture = use, adapters.select(use.split())

    def run(self) -> None:
        """Answers each line of input until the end of input."""
        with suppress(ImportError):
            importlib.import_module("readline")  # gives `input` line editing and history
        print(f"{self._active()}. Type /help for commands.")
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                print()
                return
            try:
                for piece in self.reply(line):
                    print(piece, end="", flush=True)
            except UserError as error:
                print(f"error: {error}", end="")
            except KeyboardInterrupt:
                print("\nStopped. This turn is not part of the conversation.", end="")
            print()

    def reply(self, line: str) -> Iterator[str]:
        """Yields what to show after a line of input, in pieces.

        Raises:
          UserError: the line names an unknown command or adapter; the conversation is unchanged.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/adapter" and rest:
            self._mixture, self._use = self._adapters.select(rest.split()), rest
            yield self._active()
        elif line == "/adapter":
            yield f"Available adapters: {', '.join(self._adapters.places) or 'none'}. {self._active()}"
        elif line == "/off":
            self._mixture, self._use = self._adapters.none, ""
            yield self._active()
        elif command == "/compare":
            yield self._compare(rest)
        elif line == "/new":
            self._turns = self._system
            yield "Started a new conversation"
        elif line == "/help":
            yield HELP
        elif line.startswith("/"):
            raise UserError(f"Unknown command {command}. Type /help for commands.")
        elif line:
            yield from self._answer(line)

    def _active(self) -> str:
        return f"Active adapter: {self._use}" if self._use else "No active adapter: the base model answers"

    def _answer(self, question: str) -> Iterator[str]:
        messages, shown = (*self._turns, Message("user", question)), ""
        for piece in filtered(self._generator.generate_text(self._mixture, messages, **self._options), self._rules):
            shown += piece
            yield piece
        self._turns = (*messages, Message("assistant", shown.strip()))

    def _compare(self, question: str) -> str:
        """Generates both answers in one batch; the conversation is unchanged."""
        asked = [i for i, message in enumerate(self._turns) if message.role == "user"]
        if question:
            messages = (*self._turns, Message("user", question))
        elif asked:
            messages = self._turns[: asked[-1] + 1]
        else:
            raise UserError("There is no question to compare yet. Type /compare QUESTION.")
        if not self._use:
            raise UserError("The base model is active. Choose an adapter to compare it with: /adapter NAME.")
        pair = (self._mixture, self._adapters.none)
        answers = self._generator.answers(pair, (messages, messages), **self._options)
        texts = ["".join(filtered([answer], self._rules)) for answer in answers]
        width = shutil.get_terminal_size().columns
        return "\n".join(side_by_side((self._use, texts[0]), (BASE, texts[1]), width))


def side_by_side(left: tuple[str, str], right: tuple[str, str], width: int) -> list[str]:
    """Lays out two titled texts as two columns, `width` terminal cells wide in all; returns the lines."""
    table = Table(box=box.ASCII, show_edge=False, pad_edge=False, expand=True, header_style="")
    for title, _ in (left, right):
        table.add_column(Text(title), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for _, text in (left, right)))
    console = Console(width=width, color_system=None)
    with console.capture() as shown:
        console.print(table)
    return [line.rstrip() for line in shown.get().splitlines()]
