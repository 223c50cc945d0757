"""Runs every command in README.md, docs/ and CONTRIBUTING.md, in order, in a scratch copy of the repository.

    python scripts/run_docs.py                     # in a new environment, as a reader would: half an hour on two cores
    python scripts/run_docs.py --venv .venv        # in an existing environment; commands that install are left out
    python scripts/run_docs.py --venv .venv --only "jlora data"

Blocks marked sh or python run, each in a process of its own. A comment on the line before a block changes that:

    <!-- not run: REASON -->     leaves it out; the reason is listed at the end
    <!-- replace: A => B -->     runs it with B for A, mostly to keep a run short

Exits with 1 if a block failed. The README's first block creates the environment, and its run is used by other pages.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- ([\w ]+): (.*) -->")
INSTALLS = re.compile(r"(python3 -m venv \.venv|\S*pip install [^&\n]*?)(?: && |$)", re.MULTILINE)
SHELL, TIMEOUT = ("bash", "-eo", "pipefail", "-c"), 3600  # seconds


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block, with the comments before it."""

    page: str
    line: int
    language: str  # "sh", "python", "text", ...; "" if the fence names none
    text: str  # as the reader sees it
    not_run: str  # a reason, or ""
    replacements: tuple[tuple[str, str], ...]

    @property
    def runs(self) -> bool:
        """Whether it has commands that run."""
        return self.language in ("sh", "python") and not self.not_run

    def command(self) -> str:
        """What runs."""
        text = self.text
        for old, new in self.replacements:
            if old not in text:
                raise ValueError(f"{self.page}:{self.line}: nothing to replace: {old!r} is not in the block")
            text = text.replace(old, new)
        return text


def pages() -> list[Path]:
    """README.md first, for the others use what it installs and trains."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        comments = COMMENT.findall(match[1])
        pairs = [value.partition(" => ") for name, value in comments if name == "replace"]
        yield Block(
            page=str(page.relative_to(ROOT)),
            line=text.count("\n", 0, match.start(2)) + 1,
            language=match[2],
            text=match[3],
            not_run=next((value for name, value in comments if name == "not run"), ""),
            replacements=tuple((old, new) for old, _, new in pairs),
        )


def copy_repository(target: Path) -> None:
    """Copies what git tracks or would track, changes included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run(block: Block, where: Path, *, installs: bool) -> str:
    """Runs a block; returns the end of its output if it failed, else ""."""
    text = block.command() if installs else INSTALLS.sub("", block.command())
    path = f"{where / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    command = [*SHELL, text] if block.language == "sh" else [str(where / ".venv/bin/python"), "-c", text]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(where)}
    with tempfile.TemporaryFile("w+") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        try:
            done = subprocess.run(command, cwd=where, env=environment, timeout=TIMEOUT, **streams)
            problem = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {TIMEOUT} s"
        output.seek(0)
        return f"{problem}\n{output.read()[-3000:]}" if problem else ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--venv", type=Path, help="an existing environment with jlora's dependencies")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only blocks whose PAGE:LINE or text matches")
    arguments = parser.parse_args()
    found = [block for page in pages() for block in blocks(page)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="jlora-docs-") as scratch:
        copy_repository(Path(scratch))
        if arguments.venv:
            (Path(scratch) / ".venv").symlink_to(arguments.venv.absolute())
        for block in found:
            if not (block.runs and re.search(arguments.only, f"{block.page}:{block.line}\n{block.text}")):
                continue
            start = time.perf_counter()
            problem = run(block, Path(scratch), installs=not arguments.venv)
            result = "FAILED" if problem else "ok"
            failed += bool(problem)
            print(f"{result:6} {time.perf_counter() - start:6.1f} s  {block.page}:{block.line}", flush=True)
            if problem:
                print(f"{block.command()}\n{problem}", flush=True)
    for block in found:
        if block.not_run:
            print(f"not run: {block.page}:{block.line}: {block.not_run}")
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
