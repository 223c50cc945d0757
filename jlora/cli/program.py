"""The commands of jlora, and their exit codes.

0 done; 2 the user must change something (one message, no traceback); 1 a failed verification (one message) or a bug
(traceback); 130 stopped by Ctrl-C.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable

from jlora.common.accelerators import quiet_without_accelerator
from jlora.common.errors import UserError, VerificationError
from jlora.common.terminal import CONTROL_BESIDE_BARS, EscapedStream

# Command -> description; each runs as `jlora COMMAND`, `python -m jlora COMMAND` and `python -m jlora.COMMAND`.
COMMANDS = {
    "train": "train an adapter",
    "data": "show the examples as the model sees them",
    "plan": "check whether a run fits into memory, and estimate its time",
    "export": "export an adapter for PEFT or a server, merge it into the base model, verify it",
    "generate": "answer a prompt, or chat",
    "serve": "serve a base model and its adapters with OpenAI's API, and a page to chat",
    "sweep": "train many settings on one base model, and export the best",
    "evaluate": "compare adapters with their base model on held-out rows",
    "combine": "combine adapters into one, as a weighted sum",
}
USAGE = "usage: jlora COMMAND [OPTION ...]\n\n{}\n\nRun `jlora COMMAND --help` for the options of a command."


def main() -> None:
    """Runs the console script `jlora`, and `python -m jlora`."""
    usage = USAGE.format("\n".join(f"  {name:9} {description}" for name, description in COMMANDS.items()))
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        return
    if name not in COMMANDS:
        print(f"error: Unknown command {name!r}.\n\n{usage}", file=sys.stderr)
        sys.exit(2)
    run_command(name, arguments)


def run_command(name: str, arguments: list[str] | None = None) -> None:
    """Runs one of COMMANDS and exits with its code; `arguments` default to those of the command line."""
    given = sys.argv[1:] if arguments is None else arguments

    def run(arguments: list[str]) -> None:
        with quiet_without_accelerator():  # importing JAX makes its plugins complain
            module = importlib.import_module(f"jlora.cli.{name}")
        module.main(arguments)

    run_program(run, given)


def run_program(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs `main(arguments)`; turns exceptions into messages and exit codes. JLORA_DEBUG=1 shows all tracebacks."""
    out = EscapedStream(sys.stdout)
    err = EscapedStream(sys.stderr, CONTROL_BESIDE_BARS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        _run(main, arguments)


def _run(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    try:
        main(arguments)
    except (UserError, VerificationError) as error:
        if os.environ.get("JLORA_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except BrokenPipeError:  # the reader of our output has left, as in `... | head`
        sys.stderr.close()
        os._exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
