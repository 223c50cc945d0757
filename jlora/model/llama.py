"""The LLaMA decoder and its kin in Flax NNX, with LoRA inside the projections (Touvron et al. 2023, arXiv:2302.13971).

Mistral adds a sliding window, Qwen2 biases on q/k/v, Qwen3 a norm on q and k: each is a field of the config.

Axes: B batch, T query position, S key position, N query heads, K kv heads, G=N/K, H head dim, D model,
F feed-forward, V vocabulary, L layers, r rank. Weights lie as Hugging Face stores them: [out, in].
Layers are stacked: every leaf under `layers` has a leading axis L, and the stack is run by `jax.lax.scan`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import lora
from jlora.model.attention import attention
from jlora.model.rope import DefaultRope, angles, rotate


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What decides the numbers, under config.json's own names. No field has a default."""

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
    sliding_window: int | None  # tokens that a query sees, itself included; None is all
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Where the adapter sits and how strong it is."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for decoding."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    segments: Int[Array, "B S"]  # 0 where nothing, or padding, was written
    fill: Int[Array, ""]  # places written


class LayerCache(NamedTuple):
    """One layer's share of the cache; `segments` already counts the tokens being written at `fill`."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    segments: Int[Array, "B S"]
    fill: Int[Array, ""]


class Projection(nnx.Module):
    """y = W x (+ bias), plus the adapter's (alpha/r) B A x where `name` is a target."""

    def __init__(self, name: str, inputs: int, outputs: int, spec: LoraConfig, dtype: DTypeLike, *, bias: bool) -> None:
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), dtype))
        self.biased = bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), dtype))
        self.adapted = name in spec.target_modules
        if self.adapted:
            self.lora_A = nnx.LoRAParam(jnp.zeros((spec.rank, inputs), jnp.float32))
            self.lora_B = nnx.LoRAParam(jnp.zeros((outputs, spec.rank), jnp.float32))
        self.scale = lora.scaling(spec.rank, spec.alpha)
        self.dropout = spec.dropout

    def __call__(self, x: Float[Array, "B T i"], key: PRNGKeyArray | None = None) -> Float[Array, "B T o"]:
        y = jnp.einsum("BTi,oi->BTo", x, self.weight[...].astype(x.dtype))
        if self.biased:
            y = y + self.bias[...].astype(x.dtype)[None, None]
        if not self.adapted:
            return y
        return y + lora.delta(x, self.lora_A[...], self.lora_B[...], scale=self.scale, dropout=self.dropout, key=key)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, the mean square in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return jnp.einsum("...D,D->...D", normed.astype(x.dtype), self.weight[...].astype(x.dtype))


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: LlamaConfig, spec: LoraConfig, dtype: DTypeLike) -> None:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        D, bias = config.hidden_size, config.qkv_bias
        self.q_proj = Projection("q_proj", D, queries, spec, dtype, bias=bias)
        self.k_proj = Projection("k_proj", D, keys, spec, dtype, bias=bias)
        self.v_proj = Projection("v_proj", D, keys, spec, dtype, bias=bias)
        self.o_proj = Projection("o_proj", queries, D, spec, dtype, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turned: tuple[Float[Array, "B T h"], Float[Array, "B T h"]],
        segments: Int[Array, "B T"],
        keys: list[PRNGKeyArray | None],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x, keys[0]).reshape(B, T, -1, self.config.head_dim)
        k = self.k_proj(x, keys[1]).reshape(B, T, -1, self.config.head_dim)
        v = self.v_proj(x, keys[2]).reshape(B, T, -1, self.config.head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *turned), rotate(k, *turned)
        k_segments, start = segments, jnp.zeros((), jnp.int32)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k, k, cache.fill, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v, v, cache.fill, axis=1)
            k_segments, start = cache.segments, cache.fill
            cache = cache._replace(k=k, v=v)
        mixed = attention(
            q, k, v, q_segments=segments, k_segments=k_segments, q_start=start, window=self.config.sliding_window
        )
        return self.o_proj(mixed.reshape(B, T, -1), keys[3]), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, spec: LoraConfig, dtype: DTypeLike) -> None:
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Projection("gate_proj", D, F, spec, dtype, bias=bias)
        self.up_proj = Projection("up_proj", D, F, spec, dtype, bias=bias)
        self.down_proj = Projection("down_proj", F, D, spec, dtype, bias=bias)

    def __call__(self, x: Float[Array, "B T D"], keys: list[PRNGKeyArray | None]) -> Float[Array, "B T D"]:
        gated = jax.nn.silu(self.gate_proj(x, keys[0])) * self.up_proj(x, keys[1])
        return self.down_proj(gated, keys[2])


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig, spec: LoraConfig, dtype: DTypeLike) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, spec, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, spec, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turned: tuple[Float[Array, "B T h"], Float[Array, "B T h"]],
        segments: Int[Array, "B T"],
        key: PRNGKeyArray | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        mixed, cache = self.self_attn(self.input_layernorm(x), turned, segments, keys[:4], cache)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:]), cache


class Embedding(nnx.Module):
    """The token table [V, D]; also the head where it is tied."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))


class Llama(nnx.Module):
    """The decoder; hidden states and logits are separate, so that a loss may take logits where it needs them.

    Args:
      config: the base.
      spec: the adapter.
      param_dtype: of the frozen weights; adapter weights are float32.
      compute_dtype: of activations; norms, rotary angles and softmax are float32 inside.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        config: LlamaConfig,
        spec: LoraConfig,
        *,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        remat: bool,
    ) -> None:
        self.config, self.compute_dtype, self.remat = config, compute_dtype, remat
        self.embed_tokens = Embedding(config, param_dtype)
        stack = nnx.vmap(lambda _: Layer(config, spec, param_dtype), axis_size=config.num_hidden_layers)
        self.layers = stack(None)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config, param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the last norm, and the cache with these tokens written to it.

        Args:
          tokens: token ids.
          segments: which example each token belongs to, from 1; 0 is padding.
          positions: place of each token within its example, from 0.
          key: for the adapter's dropout; None turns dropout off.
          cache: where to read and write keys and values; None in training.
        """
        turned = angles(self.config.rope, positions, self.config.head_dim)
        x = self.embed_tokens.weight[...][tokens].astype(self.compute_dtype)
        graphdef, layers = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.config.num_hidden_layers)
        if cache is not None:
            written = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.fill, axis=1)
            cache = cache._replace(segments=written)

        def layer(x: Array, leaves: tuple[Any, Any, Any]) -> tuple[Array, tuple[Array, Array] | None]:
            state, key, kv = leaves
            past = None if cache is None else LayerCache(kv[0], kv[1], cache.segments, cache.fill)
            x, past = nnx.merge(graphdef, state)(x, turned, segments, key, past)
            return x, None if past is None else (past.k, past.v)

        body = jax.checkpoint(layer, prevent_cse=False) if self.remat else layer
        kv = None if cache is None else (cache.k, cache.v)
        x, kv = jax.lax.scan(body, x, (layers, keys, kv))
        if cache is not None and kv is not None:
            cache = Cache(kv[0], kv[1], cache.segments, cache.fill + tokens.shape[1])
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Scores of the next token, float32."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        weight = head.weight[...].astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, weight, preferred_element_type=jnp.float32)


def empty_cache(config: LlamaConfig, dtype: DTypeLike, batch: int, places: int) -> Cache:
    """A cache for `batch` rows of up to `places` tokens, with nothing in it."""
    c = config
    shape = (c.num_hidden_layers, batch, places, c.num_key_value_heads, c.head_dim)
    segments = jnp.zeros((batch, places), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segments, jnp.zeros((), jnp.int32))
