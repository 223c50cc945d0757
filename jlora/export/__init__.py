"""Export: PEFT directories, merged models, GGUF, and the checks that they compute what was trained."""
