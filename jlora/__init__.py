"""LoRA fine-tuning of LLaMA-family chat models in JAX/Flax, exported to PyTorch PEFT."""

__version__ = "0.1.0"
