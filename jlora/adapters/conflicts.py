"""Adapter settings that exclude each other."""

from jlora.adapters.spec import EMBEDDINGS, AdapterSpec


def find_conflicts(spec: AdapterSpec, *, tied: bool | None = None) -> list[str]:
    """Returns a message for each pair of settings that exclude each other.

    Args:
      tied: whether the base model's head is its embedding table; None: not known yet.
    """
    named = [table for table, _ in spec.trainable_token_indices]
    found = [
        f"trainable_token_indices has {table}: {list(ids)}. Expected ids from 0, each once, of embed_tokens or lm_head."
        for table, ids in spec.trainable_token_indices
        if table not in EMBEDDINGS or named.count(table) > 1 or len(set(ids)) < len(ids) or min(ids) < 0
    ]
    keys = {table: spec.table_keys(table) for table in EMBEDDINGS}
    found += [f"{' and '.join(keys[t])} both name {t}. Remove it from one of them." for t in keys if len(keys[t]) > 1]
    variants = {
        "peft_type=IA3": spec.peft_type == "IA3",
        "use_dora": spec.use_dora,
        "init_lora_weights=pissa": spec.init_lora_weights == "pissa",
        "lora_bias": spec.lora_bias,
    }
    chosen = [key for key, on in variants.items() if on]
    found += [
        f"target_modules has {table}, which {chosen[0]} cannot change. Remove one of them."
        for table in keys
        if chosen and "target_modules" in keys[table]
    ]
    if spec.lora_bias and len(chosen) > 1:
        found.append(f"{chosen[0]} and lora_bias exclude each other. Remove one of them.")
    return found or (_tied_conflicts(spec) if tied else [])


def _tied_conflicts(spec: AdapterSpec) -> list[str]:
    """Returns a message for each pair of settings that cannot both change a table that is embedding and head."""
    keys = list(dict.fromkeys(key for table in EMBEDDINGS for key in spec.table_keys(table)))
    if len(keys) > 1:
        return [f"{' and '.join(keys)} both change the table that this base model ties. Remove one of them."]
    if spec.trained_tokens("lm_head") not in ((), spec.trained_tokens("embed_tokens")):
        return [
            "trainable_token_indices has other tokens for lm_head than for embed_tokens, but this base model ties "
            "them. Name the tokens for embed_tokens only."
        ]
    return []
