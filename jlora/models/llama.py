"""The LLaMA decoder in Flax NNX, with adapters inside the projections (Touvron et al. 2023, arXiv:2302.13971).

Related families differ by fields of the config: Mistral has a sliding window, Qwen2 biases on q/k/v, and Qwen3 norms
on q and k. `families.py` reads the config.

Axes: B batch, T query position, S key position, N query heads, K kv heads, G=N/K, H head dim, D model,
F feed-forward, V vocabulary, L layers, r rank. Weights have Hugging Face's layout, [out, in].
Layers are stacked: every leaf under `layers` has a leading axis L, and `jax.lax.scan` runs the stack.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters import params
from jlora.adapters.methods import make_method, table_method
from jlora.adapters.methods.method import FROZEN, Frozen, Leaves, kept
from jlora.adapters.neftune import noise
from jlora.adapters.params import Adapter
from jlora.adapters.spec import AdapterSpec
from jlora.distributed.sharding import constrain_rows, constrain_table
from jlora.models.attention import attention
from jlora.models.compute_settings import UNKNOWN, ComputeSettings, Packing
from jlora.models.kv_cache import KVCache
from jlora.models.model_config import ModelConfig
from jlora.models.quant import linear, zeros
from jlora.models.remat import REMAT_POLICIES
from jlora.models.rope import rotary_cos_sin, rotate


class Projection(nnx.Module):
    """y = W x (+ bias), with the adapter's method in the layers that `spec` adapts.

    Args:
      name: such as "self_attn.q_proj".
      layers: L. The projection is one layer of a stack; each call receives the index of its layer.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        spec: AdapterSpec,
        compute: ComputeSettings,
        *,
        bias: bool,
        layers: int,
    ) -> None:
        self.weight = nnx.Param(zeros(compute.quantize, outputs, inputs, compute.param_dtype))
        self.biased = bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), compute.param_dtype))
        self.method = make_method(spec, name)
        self.site = self.method.site(layers)
        self.adapted = any(self.site.ranks)
        if self.adapted:
            for leaf, shape in self.method.shapes(max(self.site.ranks), inputs, outputs).items():
                setattr(self, leaf, nnx.LoRAParam(jnp.zeros(shape, jnp.float32)))

    def __call__(
        self, x: Float[Array, "B T i"], layer: Int[Array, ""], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T o"]:
        weight = self.weight.get_value()
        bias = self.bias[...].astype(x.dtype)[None, None] if self.biased else 0.0
        frozen = Frozen(weight, bias, partial(linear, weight=weight))
        if not self.adapted:
            return kept(frozen.product(x)) + frozen.bias
        values = {leaf: getattr(self, leaf.name)[...] for leaf in self.method.leaves()}
        leaves = {leaf.name: jax.lax.stop_gradient(v) if leaf.rate == FROZEN else v for leaf, v in values.items()}
        return self.method.apply(x, frozen, leaves, self.site.scale(layer), key)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, normalized in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return jnp.einsum("...D,D->...D", normed.astype(x.dtype), self.weight[...].astype(x.dtype))


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, spec: AdapterSpec, compute: ComputeSettings) -> None:
        self.compute = compute
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        D, L, bias = config.hidden_size, config.num_hidden_layers, config.qkv_bias
        self.q_proj = Projection("self_attn.q_proj", D, queries, spec, compute, bias=bias, layers=L)
        self.k_proj = Projection("self_attn.k_proj", D, keys, spec, compute, bias=bias, layers=L)
        self.v_proj = Projection("self_attn.v_proj", D, keys, spec, compute, bias=bias, layers=L)
        self.o_proj = Projection("self_attn.o_proj", queries, D, spec, compute, bias=config.o_bias, layers=L)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, compute.param_dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, compute.param_dtype)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: tuple[Float[Array, "B T h"], Float[Array, "B T h"]],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        layer: Int[Array, ""],
        keys: list[PRNGKeyArray | None],
        cache: KVCache | None,
        packing: Packing,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x, layer, keys[0]).reshape(B, T, -1, self.config.head_dim)
        k = self.k_proj(x, layer, keys[1]).reshape(B, T, -1, self.config.head_dim)
        v = self.v_proj(x, layer, keys[2]).reshape(B, T, -1, self.config.head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        window = self.config.sliding_window
        if cache is not None:
            cache = cache.written(layer, k, v, segments, positions)
            out = cache.attend(layer, q, positions, window)
        else:
            out = attention(
                q,
                k,
                v,
                q_segments=segments,
                k_segments=segments,
                q_start=0,
                window=window,
                backend=self.compute.attention,
                mesh=self.compute.mesh,
                packing=packing,
            )
        return self.o_proj(out.reshape(B, T, -1), layer, keys[3]), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, spec: AdapterSpec, compute: ComputeSettings) -> None:
        D, F, L, bias = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.mlp_bias
        self.gate_proj = Projection("mlp.gate_proj", D, F, spec, compute, bias=bias, layers=L)
        self.up_proj = Projection("mlp.up_proj", D, F, spec, compute, bias=bias, layers=L)
        self.down_proj = Projection("mlp.down_proj", F, D, spec, compute, bias=bias, layers=L)

    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""], keys: list[PRNGKeyArray | None]
    ) -> Float[Array, "B T D"]:
        gated = jax.nn.silu(self.gate_proj(x, layer, keys[0])) * self.up_proj(x, layer, keys[1])
        return self.down_proj(gated, layer, keys[2])


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, spec: AdapterSpec, compute: ComputeSettings) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, compute.param_dtype)
        self.self_attn = Attention(config, spec, compute)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, compute.param_dtype)
        self.mlp = MLP(config, spec, compute)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: tuple[Float[Array, "B T h"], Float[Array, "B T h"]],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        layer: Int[Array, ""],
        key: PRNGKeyArray | None,
        cache: KVCache | None,
        packing: Packing,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        attended, cache = self.self_attn(
            self.input_layernorm(x), cos_sin, segments, positions, layer, keys[:4], cache, packing
        )
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), layer, keys[4:]), cache


class TokenTable(nnx.Module):
    """A token table [V, D] with its adapter: the embedding, or the head. A tied head has an adapter alone.

    Args:
      name: "embed_tokens" or "lm_head".
    """

    def __init__(self, name: str, config: ModelConfig, spec: AdapterSpec, dtype: DTypeLike) -> None:
        shape, tied = (config.vocab_size, config.hidden_size), config.tie_word_embeddings
        self.method = table_method(spec, name, tied=tied)
        if name == "embed_tokens" or not tied:
            self.weight = nnx.Param(jnp.zeros(shape, dtype))
        for leaf, size in self.method.shapes(*shape).items():
            setattr(self, leaf, nnx.LoRAParam(jnp.zeros(size, jnp.float32)))

    def _leaves(self) -> Leaves:
        return {leaf.name: getattr(self, leaf.name)[...] for leaf in self.method.leaves()}

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the embeddings of the tokens."""
        return self.method.embed(tokens, self.weight[...], self._leaves())

    def head(
        self, hidden: Float[Array, "*N D"], weight: Float[Array, "V D"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "*N E"], Float[Array, "V E"]]:
        """Returns hidden states and a table whose products are the logits."""
        return self.method.head(hidden, weight, self._leaves(), key)


class Llama(nnx.Module):
    """The decoder. Hidden states and logits are separate calls, so that a loss computes only the logits that it needs.

    Args:
      config: the base model.
      spec: the adapter.
      compute: dtypes and other choices that do not change the model.
    """

    def __init__(self, config: ModelConfig, spec: AdapterSpec, compute: ComputeSettings) -> None:
        self.config, self.compute, param_dtype = config, compute, compute.param_dtype
        self.spec, tied = spec, config.tie_word_embeddings
        self.embed_tokens = TokenTable("embed_tokens", config, spec, param_dtype)
        stack = nnx.vmap(lambda _: Layer(config, spec, compute), axis_size=config.num_hidden_layers)
        self.layers = stack(None)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        if not tied or spec.table_rank("lm_head"):
            self.lm_head = TokenTable("lm_head", config, spec, param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        cache: KVCache | None = None,
        packing: Packing = UNKNOWN,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns hidden states after the final norm, and the cache with these tokens added.

        Args:
          tokens: token ids.
          segments: example that each token belongs to, from 1; 0 is padding, -1 the shared prefix.
          positions: position of each token within its example, from 0.
          key: for the adapter's dropout and noise on embeddings; None turns both off.
          cache: keys and values so far; None in training.
          packing: bounds on the packed rows.
        """
        cos_sin = rotary_cos_sin(self.config.rope, positions, self.config.head_dim)
        x = self.embed_tokens.embed(tokens).astype(self.compute.compute_dtype)
        if key is not None and self.spec.neftune_noise_alpha:
            key, noise_key = jax.random.split(key)
            x = noise(x, segments, self.spec.neftune_noise_alpha, noise_key)
        if cache is None:
            x = constrain_rows(x, self.compute.mesh)
        keys = None if key is None else jax.random.split(key, self.config.num_hidden_layers)
        graphdef, layers = nnx.split(self.layers)

        def layer(carry: tuple[Array, KVCache | None], leaves: tuple[Any, Array, Any]) -> tuple[Any, None]:
            (x, cache), (state, index, key) = carry, leaves
            return nnx.merge(graphdef, state)(x, cos_sin, segments, positions, index, key, cache, packing), None

        policy = REMAT_POLICIES[self.compute.remat]
        body = layer if policy is None else jax.checkpoint(layer, prevent_cse=False, policy=policy)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, jnp.arange(self.config.num_hidden_layers), keys))
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Returns logits of the next token; float32."""
        return scores(*self.head(hidden))

    def head(
        self, hidden: Float[Array, "*N D"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "*N E"], Float[Array, "V E"]]:
        """Returns what `scores` takes. The table is gathered from all devices that hold a part of it.

        Args:
          hidden: final hidden states.
          key: as for the hidden states.
        """
        tied = self.config.tie_word_embeddings
        weight = (self.embed_tokens if tied else self.lm_head).weight[...]
        if not tied or self.spec.table_rank("lm_head"):
            hidden, weight = self.lm_head.head(hidden, weight, key)
        elif self.embed_tokens.method.shared:
            hidden, weight = self.embed_tokens.head(hidden, weight, key)
        return hidden, constrain_table(weight, self.compute.mesh)


def neutral_adapter(graphdef: nnx.GraphDef[Llama], adapter: Adapter, base: Any) -> Adapter:
    """Returns an adapter of the same form that changes nothing, for a model from `hf_loader.abstract_model`."""
    return params.neutral(nnx.merge(graphdef, adapter, base).spec, adapter, base)


def scores(hidden: Float[Array, "*N E"], table: Float[Array, "V E"]) -> Float[Array, "*N V"]:
    """Returns logits of the next token; float32."""
    return jnp.einsum("...D,VD->...V", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
