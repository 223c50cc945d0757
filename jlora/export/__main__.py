"""`python -m jlora.export`, the same as `jlora export`; the program is jlora/cli/export.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("export")
