"""Export: PEFT directories, merged models, GGUF, and checks that they compute what was trained."""
