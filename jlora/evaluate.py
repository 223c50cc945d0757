"""`python -m jlora.evaluate`, the same as `jlora evaluate`; the program is jlora/cli/evaluate.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("evaluate")
