"""The one exception for what a user can mend, and the exit codes of every program.

Exit codes: 0 done; 2 the user must change something (one message, no traceback); 1 a fault of ours (traceback);
130 stopped by Ctrl-C.
"""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """What was got, what was expected, and the key or file:line to change."""


def run_program(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)` as a command-line program and exits; JLORA_DEBUG=1 shows tracebacks of user errors too."""
    try:
        main(sys.argv[1:])
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
