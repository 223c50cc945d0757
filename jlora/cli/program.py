"""The commands of jlora, and how each of them ends.

Exit codes: 0 done; 2 the user must change something (one message, no traceback); 1 a fault of ours (traceback);
130 stopped by Ctrl-C.
"""

import importlib
import os
import sys
from collections.abc import Callable

from jlora.common.errors import UserError

# Command -> what it does; each is `jlora COMMAND`, `python -m jlora COMMAND` and `python -m jlora.COMMAND`.
COMMANDS = {
    "train": "train an adapter",
    "data": "show the rows as the model will see them",
    "plan": "say whether a run fits, and what it costs",
    "export": "write a run's adapter for PEFT or a server, merge it, verify it",
    "generate": "answer a prompt, or chat",
    "combine": "write a weighted sum of adapters as one",
}
USAGE = "usage: jlora COMMAND [OPTION ...]\n\n{}\n\njlora COMMAND --help lists the options of a command."


def main() -> None:
    """The console script `jlora`, and `python -m jlora`."""
    usage = USAGE.format("\n".join(f"  {name:9} {does}" for name, does in COMMANDS.items()))
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        return
    if name not in COMMANDS:
        sys.exit(f"error: Unknown command {name!r}.\n\n{usage}")
    run_command(name, arguments)


def run_command(name: str, arguments: list[str] | None = None) -> None:
    """Runs one of COMMANDS and exits; `arguments` are the command line's own unless given."""
    given = sys.argv[1:] if arguments is None else arguments
    run_program(lambda argv: importlib.import_module(f"jlora.cli.{name}").main(argv), given)


def run_program(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs `main(arguments)` and exits; JLORA_DEBUG=1 shows tracebacks of user errors too."""
    try:
        main(arguments)
    except UserError as error:
        if os.environ.get("JLORA_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has left, as in `... | head`
        sys.stderr.close()
        os._exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
