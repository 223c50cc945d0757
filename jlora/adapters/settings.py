"""The adapter settings of a config -> AdapterSpec, and back."""

import dataclasses
from typing import Any

from jlora.adapters.methods import base_method
from jlora.adapters.spec import ALL_LINEAR, NO_ADAPTER, TARGETS, AdapterSpec

# Field of the spec -> key of the config, if their names differ.
KEYS = {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout"}
FIELDS = tuple(field.name for field in dataclasses.fields(AdapterSpec))


def spec_of(settings: dict[str, Any]) -> AdapterSpec:
    """Returns the spec that the keys of a config describe.

    Keys that are missing, or that have no effect with the chosen `peft_type`, leave their fields as in `NO_ADAPTER`.
    """
    unused = base_method(settings.get("peft_type", NO_ADAPTER.peft_type)).unused
    keys = {field: KEYS.get(field, field) for field in FIELDS}
    given = {field: settings[key] for field, key in keys.items() if key in settings and key not in unused}
    spec = dataclasses.replace(NO_ADAPTER, **given)
    return dataclasses.replace(spec, target_modules=TARGETS) if spec.target_modules == ALL_LINEAR else spec


def recorded_spec(record: dict[str, Any]) -> AdapterSpec:
    """Returns the spec of a run's adapter from its config.json, with the rows that `resize_embeddings` added."""
    return dataclasses.replace(spec_of(record["config"]), vocabulary=int(record["base"]["vocabulary"] or 0))


def settings_of(spec: AdapterSpec) -> dict[str, Any]:
    """Returns the config keys that make this spec of one adapter, without the noise on embeddings."""
    settings = {KEYS.get(field, field): getattr(spec, field) for field in FIELDS}
    del settings["neftune_noise_alpha"]  # a setting of training, not of the adapter
    del settings["mixed"], settings["swept"]  # forms in which several adapters share a program
    settings["resize_embeddings"] = settings.pop("vocabulary") > 0  # the tokenizer says how many rows
    return settings
