"""`python -m jlora.plan`, the same as `jlora plan`; the program is jlora/cli/plan.py."""

from jlora.cli.program import run_command

if __name__ == "__main__":
    run_command("plan")
