"""The memory of decoding, as the compiler counts it, for SmolLM2's shapes; no weight is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.adapters.spec import AdapterSpec
from jlora.data.tokenizer import load_tokenizer
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.serve.generator import Generator

SPEC = AdapterSpec(rank=16, alpha=32.0, dropout=0.0, target_modules=("q_proj", "v_proj"))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_decoding_updates_the_cache_in_place(smollm, rows):
    """With temporaries below a tenth of the cache, whose buffer is the result's too."""
    graphdef, adapter, base = hf_loader.abstract_model(read_config(smollm), SPEC, FLOAT32_COMPUTE)
    generator = Generator(smollm, load_tokenizer(smollm, ""), graphdef, base, jnp.float32)
    *_, cache = jax.eval_shape(lambda: generator._pad([[1]] * rows, 16384))
    adapters = jax.eval_shape(generator._stack, (adapter,) * rows)
    token = np.ones((rows, 1), np.int32)
    program = generator._run.lower(adapters, base, token, token, token, cache).compile()
    analysis, size = program.memory_analysis(), 2 * cache.k.size * cache.k.dtype.itemsize
    assert analysis.temp_size_in_bytes < 0.1 * size <= 0.1 * analysis.alias_size_in_bytes
