"""`python -m jlora.sweep`, the same as `jlora sweep`; the program is jlora/cli/sweep.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("sweep")
