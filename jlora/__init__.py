"""LoRA fine-tuning of LLaMA-family chat models in JAX/Flax, exported to PyTorch PEFT.

The Python API is documented in jlora.api; its names are attributes of `jlora` too.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from jlora.common.accelerators import quiet_without_accelerator

if TYPE_CHECKING:
    from jlora.api import Result, finetune, load_config
    from jlora.common.errors import UserError, VerificationError
    from jlora.config.schema import Config
    from jlora.export.exporter import export_adapter, verify_adapter
    from jlora.export.verify import Parity
    from jlora.serve.loading import Model, load_model

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Model",
    "Parity",
    "Result",
    "UserError",
    "VerificationError",
    "export_adapter",
    "finetune",
    "load_config",
    "load_model",
    "verify_adapter",
]

# Name -> module, so that a program imports only what it uses: all of jlora.api takes a second longer than load_model.
_MODULES = {
    "Config": "jlora.config.schema",
    "Model": "jlora.serve.loading",
    "Parity": "jlora.export.verify",
    "UserError": "jlora.common.errors",
    "VerificationError": "jlora.common.errors",
    "export_adapter": "jlora.export.exporter",
    "load_model": "jlora.serve.loading",
    "verify_adapter": "jlora.export.exporter",
}

# Without this, transformers warns at import that PyTorch is missing; jlora uses only its tokenizers.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """Imports the names of the API on first use, so that `import jlora` stays fast."""
    if name in __all__:
        with quiet_without_accelerator():  # importing JAX makes its plugins complain
            module = importlib.import_module(_MODULES.get(name, "jlora.api"))
        return getattr(module, name)
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")
