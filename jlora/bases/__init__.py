"""Base models: a directory, a hub id, a GGUF file or a package, resolved to a Hugging Face directory."""
