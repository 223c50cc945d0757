"""A file of results that an interrupted evaluation continues: one line of JSON for each, written at once."""

import contextlib
import json
from pathlib import Path
from typing import Any

from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError


class Journal:
    """Results by key. Keys are tuples of words and numbers; a key is never written twice.

    Args:
      file: it is created, or continued.
      inputs: name -> hash of everything that the results depend on.

    Raises:
      UserError: the file has the results of other inputs, or cannot be read.
    """

    def __init__(self, file: Path, inputs: dict[str, str]) -> None:
        self._found: dict[tuple[Any, ...], Any] = {}
        first = json.dumps({"inputs": inputs}, ensure_ascii=False) + "\n"
        with contextlib.suppress(FileNotFoundError):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]  # a killed writer leaves half a line
            before = json.loads(complete[0])["inputs"] if complete else inputs
            changed = [name for name in {**inputs, **before} if inputs.get(name) != before.get(name)]
            if changed:
                raise UserError(
                    f"{file.parent} contains an evaluation with other inputs ({', '.join(changed)}). Choose another "
                    "--output, or remove this directory."
                )
            for line in complete[1:]:
                key, value = json.loads(line)
                self._found[tuple(key)] = value
            if len(complete) < len(lines):
                replace_text(file, "".join(complete))
        new = not file.exists() or not file.stat().st_size
        self._file = file.open("a", encoding="utf-8")
        if new:
            self._write(first)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._found

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return self._found[key]

    def add(self, key: tuple[Any, ...], value: Any) -> None:
        """Keeps a result: a value of JSON."""
        self._write(json.dumps([key, value], ensure_ascii=False) + "\n")
        self._found[key] = value

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()
