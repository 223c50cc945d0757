"""Tries a chat template in a process of its own, because a template is a program, and a base model's is a stranger's.

Run as a script, this file reads a template and renders it with limits on time, memory and the length of its text.
"""

import contextlib
import functools
import re
import subprocess
import sys

SECONDS, MEMORY, TEXT = 5, 2**30, 2**20  # of processor time, bytes, characters
TURNS = [
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "It is. " * 200},
    {"role": "user", "content": "Why? " * 200},
]
CHATS = [TURNS[:1], TURNS, [{"role": "system", "content": "Be brief."}, *TURNS[:2]]]


@functools.lru_cache
def find_excess(template: str) -> str:
    """Describes the limit that a template exceeds on short conversations; "" if it exceeds none, or fails."""
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(command, input=template.encode(), capture_output=True, timeout=4 * SECONDS)
    except subprocess.TimeoutExpired:
        return f"it runs for more than {SECONDS} s"
    if done.returncode in (0, 1):
        return done.stdout.decode().strip()
    return f"it runs for more than {SECONDS} s, or needs more than {MEMORY >> 30} GiB"


def _render(template: str) -> str:
    """Renders the conversations within the limits, as transformers does; returns as `find_excess`."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> str:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: form}
    compiled = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    for chat in CHATS:
        for prompt in (True, False):
            length = 0
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):  # some reject a system turn
                values = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
                for piece in compiled.generate(messages=chat, add_generation_prompt=prompt, **values):
                    length += len(piece)
                    if length > TEXT:
                        return f"it makes more than {TEXT >> 20} million characters of a short conversation"
    return ""


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        print(_render(sys.stdin.buffer.read().decode()))
    except MemoryError:
        print(f"it needs more than {MEMORY >> 30} GiB")
    except Exception as error:  # the program itself reports what fails
        print(type(error).__name__, file=sys.stderr)
