"""LoRA fine-tuning of LLaMA-family chat models in JAX/Flax, exported to PyTorch PEFT. In Python: see jlora.api."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.api import Result, finetune
    from jlora.config.files import load_config
    from jlora.config.schema import Config
    from jlora.export.exporter import export_adapter, verify_adapter
    from jlora.serve.loading import Model, load_model

__version__ = "0.1.0"
__all__ = ["Config", "Model", "Result", "export_adapter", "finetune", "load_config", "load_model", "verify_adapter"]

# Without this, transformers warns at import that PyTorch is missing; jlora uses only its tokenizers.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """The names above, imported when they are first used, so that `import jlora` stays light."""
    if name in __all__:
        return getattr(importlib.import_module("jlora.api"), name)
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")
