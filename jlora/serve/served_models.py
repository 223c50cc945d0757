"""The models that a server offers by name: the base model, its adapters, and weighted sums of them."""

import dataclasses
import re
from pathlib import Path

from jlora.adapters import combining
from jlora.adapters.combining import AdapterSet, Form, Mixture
from jlora.common.errors import UserError
from jlora.common.paths import path_problem
from jlora.serve.engine import Engine
from jlora.serve.loading import read_complete, template_text

BASE = "base"  # the model name of the base model
NAME = re.compile(r"[\w.-]{1,64}")


class ServedModels:
    """Names, and the adapters behind them. Adapters can be added and removed while requests run.

    Args:
      directory: the base model's directory.
      root: directory below which adapters may be loaded while the server runs; None: nowhere.
      template: the text of the chat template with which its adapters were trained, or ""; see `template_text`.
    """

    def __init__(self, adapters: AdapterSet, directory: Path, root: Path | None, template: str) -> None:
        self._adapters, self._directory, self._template = adapters, directory, template
        self._root = root and root.resolve()

    @property
    def names(self) -> list[str]:
        """All names, without sums."""
        return [*self._adapters.places, BASE]

    def select(self, model: str) -> Mixture:
        """Returns the mixture that a name stands for, such as "base", "law" or "law:0.7+brief:0.3".

        Raises:
          UserError: there is no such adapter, or it cannot be part of a sum.
        """
        if model == BASE:
            return self._adapters.none
        return self._adapters.select([re.sub(r":([^:]*)$", r"=\1", part) for part in model.split("+")])

    def read(self, name: str, path: str) -> Form:
        """Returns an adapter in a directory below the root.

        Raises:
          UserError: the name or the directory is not allowed, or the adapter cannot be served beside the others.
        """
        self._check_new(name)
        assert self._root is not None
        problem = UserError(f"lora_path={path!r}: Expected a directory below --adapter_root.")
        if path_problem(path) or "\0" in path:
            raise problem
        place = (self._root / path).resolve()
        if not place.is_relative_to(self._root) or not place.is_dir():
            raise problem
        if template_text({name: place}) != self._template:
            raise UserError(f"lora_path={path!r} was trained with another chat template than the server uses.")
        (form,) = read_complete({name: place}, self._directory).values()
        combining.check_summable(name, form[1])
        return form

    def add(self, name: str, form: Form, engine: Engine) -> None:
        """Adds an adapter; must run between two steps of the engine.

        Raises:
          UserError: there is no place for it, or it does not fit beside the others.
        """
        self._check_new(name)  # again, because another request may have been faster
        used = set(self._adapters.places.values())
        free = [i for i in range(self._adapters.spec.mixed) if i not in used and not engine.uses(i)]
        if not free:
            raise UserError(f"{len(used)} adapters are loaded, as many as --max_adapters allows. Unload one first.")
        adapter = combining.placed((self._adapters.adapter, self._adapters.spec), free[0], form)
        engine.replace_adapter(adapter)
        places = {**self._adapters.places, name: free[0]}
        self._adapters = dataclasses.replace(self._adapters, places=places, adapter=adapter)

    def _check_new(self, name: str) -> None:
        if not NAME.fullmatch(name) or name in self.names:
            raise UserError(f"lora_name={name!r}: Expected a new name of letters, digits, '.', '-' and '_'.")

    def remove(self, name: str) -> None:
        """Removes an adapter's name, between two steps as `add`; requests that run with it are answered to their end.

        Raises:
          UserError: no adapter has this name.
        """
        if name not in self._adapters.places:
            raise UserError(f"lora_name={name!r}: No adapter has this name.")
        places = {other: place for other, place in self._adapters.places.items() if other != name}
        self._adapters = dataclasses.replace(self._adapters, places=places)
