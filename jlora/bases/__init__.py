"""Base models: from a name, a directory or a GGUF file to a local Hugging Face directory, and its identity."""
