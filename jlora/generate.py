"""`python -m jlora.generate`, the same as `jlora generate`; the program is jlora/cli/generate.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("generate")
