"""The model's config: everything in config.json that decides the numbers. `families.py` reads it."""

import dataclasses

from jlora.models.rope import DefaultRope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the numbers, under config.json's names if it has them. No field has a default."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    rms_norm_eps: float
    rope: DefaultRope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None  # tokens that a query sees, including itself; None means no limit
    tie_word_embeddings: bool

    @property
    def matrices(self) -> int:
        """Number of parameters in a layer's seven projections, without biases."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size)
