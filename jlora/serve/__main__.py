"""`python -m jlora.serve`, the same as `jlora.serve`; the program is jlora/cli/serve.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("serve")
