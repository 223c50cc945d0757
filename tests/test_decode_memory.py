"""The cache of keys and values is updated in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.adapters.spec import AdapterSpec
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.models.kv_cache import BLOCK, empty_kv_cache
from jlora.serve.engine import CHUNKS, Engine


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (8, 1), (1, CHUNKS[-1])], ids=["token", "tokens", "chunk"])
def test_a_step_updates_the_cache_in_place(smollm, rows, length):
    """With temporaries below a tenth of a cache of 8 x 2048 tokens, by the compiler's own count; no weight is read."""
    spec = AdapterSpec(32, 32.0, 0.0, ("q_proj", "v_proj"), mixed=2)
    graphdef, adapter, base = hf_loader.abstract_model(config := read_config(smollm), spec, FLOAT32_COMPUTE)
    engine = Engine(config, graphdef, base, adapter, spec, jnp.float32, frozenset(), 8, 0)
    blocks = 8 * 2048 // BLOCK
    cache = jax.eval_shape(lambda: empty_kv_cache(config, jnp.float32, blocks + 1))
    token = np.ones((rows, length), np.int32)
    inputs = np.zeros((rows, blocks), np.int32), token, token, token, np.zeros((rows, 2), np.float32)
    analysis = engine._forward.lower(adapter, base, cache, *inputs).compile().memory_analysis()
    size = 2 * cache.k.size * cache.k.dtype.itemsize
    assert analysis.temp_size_in_bytes < 0.1 * size <= 0.1 * analysis.alias_size_in_bytes
    kept = jax.jit(engine._forward.__wrapped__).lower(adapter, base, cache, *inputs).compile().memory_analysis()
    assert kept.alias_size_in_bytes == 0  # the negative control: without donation, there is a second cache
