"""LoRA fine-tuning of LLaMA-family chat models in JAX/Flax, exported to PyTorch PEFT."""

import os

__version__ = "0.1.0"

# Without this, transformers says at import that PyTorch is missing; jlora takes only its tokenizers.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
