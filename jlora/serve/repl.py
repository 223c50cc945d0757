"""A conversation in the terminal, in which adapters are switched, mixed, and compared with the base."""

import importlib
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from jlora.adapters.mixing import Voices
from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.serve.generator import Generator
from jlora.serve.output_rules import Rules, filtered

HELP = """\
/adapter NAME            answer with this adapter from now on; /adapter alone lists them
/adapter A=0.7 B=-0.3    with a weighted sum of adapters; a negative weight takes one away
/off                     answer as the base alone
/compare [QUESTION]      what the adapter and the base say, side by side; of the last question, or of another
/new                     forget the conversation
/help                    this
Ctrl-C stops an answer, Ctrl-D (end of input) leaves. All else is said to the model."""
OFF = "base"  # what the column of the base is called
GAP = " | "


class Chat:
    """One conversation.

    Args:
      system: what stands before everything that is said.
      options: for `Generator.pieces`.
      use: the words for `Voices.mixed` to begin with; "" is the base alone.
    """

    def __init__(
        self,
        generator: Generator,
        voices: Voices,
        rules: Rules,
        system: tuple[Message, ...],
        options: Mapping[str, Any],
        use: str,
    ) -> None:
        self._generator, self._voices, self._rules, self._options = generator, voices, rules, options
        self._system = self._said = system
        self._base = generator.neutral(next(iter(voices.adapters.values()), {}))
        self._name, self._adapter = (use, voices.mixed(use.split())) if use else (OFF, self._base)

    def run(self) -> None:
        """Answers what is typed, until the end of input."""
        with suppress(ImportError):
            importlib.import_module("readline")  # from then on, `input` lets a line be edited
        print(f"speaking: {self._name}; /help says what can be done")
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
                print("\nstopped: the conversation is as it was before", end="")
            print()

    def reply(self, line: str) -> Iterator[str]:
        """What is shown after one line, in pieces as they come.

        Raises:
          UserError: the line names what there is not; the conversation stays as it was.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/adapter" and rest:
            self._adapter, self._name = self._voices.mixed(rest.split()), rest
            yield f"speaking: {self._name}"
        elif line == "/adapter":
            yield f"there are: {', '.join(self._voices.adapters) or 'none'}; speaking: {self._name}"
        elif line == "/off":
            self._adapter, self._name = self._base, OFF
            yield f"speaking: {self._name}"
        elif command == "/compare":
            yield self._compare(rest)
        elif line == "/new":
            self._said = self._system
            yield "the conversation is forgotten"
        elif line == "/help":
            yield HELP
        elif line.startswith("/"):
            raise UserError(f"there is no command {command}; /help lists them")
        elif line:
            yield from self._answer(line)

    def _answer(self, question: str) -> Iterator[str]:
        messages, shown = (*self._said, Message("user", question)), ""
        for piece in filtered(self._generator.pieces(self._adapter, messages, **self._options), self._rules):
            shown += piece
            yield piece
        self._said = (*messages, Message("assistant", shown.strip()))

    def _compare(self, question: str) -> str:
        """Both answers, made in one batch; the conversation stays as it was."""
        asked = [i for i, message in enumerate(self._said) if message.role == "user"]
        if question:
            messages = (*self._said, Message("user", question))
        elif asked:
            messages = self._said[: asked[-1] + 1]
        else:
            raise UserError("nothing was asked yet: /compare QUESTION")
        if self._adapter is self._base:
            raise UserError("the base alone is speaking: choose with /adapter NAME what to compare it with")
        # to be rows of one batch, both must have one form: a sum has more ranks than what does nothing
        pair = (self._adapter, self._generator.neutral(self._adapter))
        answers = self._generator.answers(pair, (messages, messages), **self._options)
        said = ["".join(filtered([answer], self._rules)) for answer in answers]
        width = shutil.get_terminal_size().columns
        return "\n".join(side_by_side((self._name, said[0]), (OFF, said[1]), width))


def side_by_side(left: tuple[str, str], right: tuple[str, str], width: int) -> Iterator[str]:
    """Two titled texts as columns of a terminal `width` cells wide; Chinese and kin take two cells a character."""
    column = max((width - len(GAP)) // 2, 8)
    columns = [[*_wrap(title, column), "-" * column, *_wrap(text, column)] for title, text in (left, right)]
    for row in range(max(map(len, columns))):
        cells = [lines[row] if row < len(lines) else "" for lines in columns]
        yield (cells[0] + " " * (column - _cells(cells[0])) + GAP + cells[1]).rstrip()


def _wrap(text: str, width: int) -> Iterator[str]:
    """Lines of at most `width` cells, cut after a space where there is one."""
    for line in text.expandtabs(4).split("\n"):
        while _cells(line) > width:
            end = max(i for i in range(len(line) + 1) if _cells(line[:i]) <= width)
            space = line.rfind(" ", 0, end + 1)
            cut = space + 1 if space > 0 else end
            yield line[:cut].rstrip()
            line = line[cut:]
        yield line


def _cells(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
