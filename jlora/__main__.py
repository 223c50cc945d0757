"""`python -m jlora COMMAND`, the same as `jlora COMMAND`."""

from jlora.cli.program import main

if __name__ == "__main__":
    main()
