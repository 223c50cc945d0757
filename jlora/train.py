"""`python -m jlora.train`, the same as `jlora train`; the program is jlora/cli/train.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("train")
