"""`python -m jlora.data`, the same as `jlora data`; the program is jlora/cli/data.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("data")
