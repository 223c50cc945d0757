"""`python -m jlora.combine`, the same as `jlora combine`; the program is jlora/cli/combine.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("combine")
