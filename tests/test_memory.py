"""The memory of the training step, as the compiler counts it, for SmolLM2's shapes; no weight is read."""

import dataclasses
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from jlora.adapters.settings import spec_of
from jlora.common import hf_names, malloc
from jlora.config.files import load_config
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.distributed import sharding
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE, Packing
from jlora.models.families import read_config
from jlora.planning import hardware
from jlora.planning.forecast import forecast, make_job
from jlora.steps import compilation, optim
from jlora.steps.programs import Programs, batch_shapes, placed_shapes, state_shapes

MIB = 1 << 20


@pytest.fixture(scope="module")
def temporaries(smollm):
    """Bytes of temporaries of a step on one row of a length."""
    config, model = load_config(str(ROOT / "configs/law.py"), []), read_config(smollm)
    spec, mesh = spec_of(dataclasses.asdict(config)), sharding.make_mesh(jax.devices()[:1])

    def of(length, remat):
        graphdef, adapter, base = hf_loader.abstract_model(
            model, spec, dataclasses.replace(FLOAT32_COMPUTE, remat=remat, mesh=mesh)
        )
        optimizer = optim.make_optimizer(config, spec, 100)
        programs = Programs(graphdef, placed_shapes(base, mesh, "base"), optimizer, mesh, dropout=False, seed=0)
        batch = batch_shapes(1, 1, Shape(length, length), mesh)
        state = state_shapes(adapter, optimizer, mesh, FLOAT32_COMPUTE.compute_dtype)
        program = programs.compile_training(state, batch, lambda line: None)
        return program.memory_analysis().temp_size_in_bytes

    return of


@pytest.mark.slow
def test_memory_grows_linearly_with_row_length(temporaries):
    short, long, longest = (temporaries(length, "full") for length in (1024, 4096, 8192))
    assert long < 900 * MIB
    assert long <= 4 * short and longest <= 2 * long


def test_compiler_works_if_xla_lacks_the_options(monkeypatch):
    def lower():
        return jax.jit(lambda x: x + 1).lower(1.0)

    known, other = compilation.Compiler("cpu"), compilation.Compiler("tpu")
    assert known("a step", lower, print)(2.0) == other("a step", lower, print)(2.0) == 3.0
    options = dict.fromkeys(compilation.OPTIONS["cpu"], "NO_SUCH_VALUE") | {"xla_cpu_no_such_option": "1"}
    with pytest.raises(jax.errors.JaxRuntimeError):
        lower().compile(compiler_options=options)
    lower().compile(compiler_options=compilation.OPTIONS["cpu"])  # this one knows them
    monkeypatch.setitem(compilation.OPTIONS, "cpu", options)
    assert compilation.Compiler("cpu")("a step", lower, print)(2.0) == 3.0


FAULTS = """
import resource
from jlora.common import hf_names, malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
malloc.retain_freed_memory()
faults()
print(faults())
malloc.trim()
print(faults())
"""


@pytest.mark.skipif(malloc.GLIBC is None, reason="not glibc")
def test_malloc_keeps_freed_memory_until_give_back():
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    before, kept, given_back = map(int, said.split())
    assert min(before, given_back) > 10_000 and kept < 100  # of 16,384 pages


@pytest.mark.slow
def test_more_remat_needs_less_memory(temporaries):
    none, dots, full = (temporaries(512, remat) for remat in ("none", "dots", "full"))
    assert full < 0.5 * dots and dots < 0.8 * none


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_an_adapted_projection_keeps_one_product(smollm, remat):
    """With remat=dots, W x + B A x, not both; all seven projections adapted keep no more than one."""

    def per_layer(targets):
        """Bytes that one more layer adds, without its weights, adapter and optimizer state."""
        config = dataclasses.replace(Config(), target_modules=targets, remat=remat, mesh={}, lora_rank=1)

        def rest(layers):
            model = dataclasses.replace(read_config(smollm), num_hidden_layers=layers)
            target = hardware.Target("here", jax.devices()[:1], None, None)

            def layout(config, ways):
                return 1, 1, Shape(512, 64), Packing(0, 1, 512)

            compute = dataclasses.replace(FLOAT32_COMPUTE, attention="xla")
            return forecast(make_job(config, model, compute, target, layout)).memory.rest

        return (rest(12) - rest(4)) / 8

    model = read_config(smollm)
    heads = model.num_attention_heads * model.head_dim
    outputs = (
        2 * heads + 2 * model.num_key_value_heads * model.head_dim + 2 * model.intermediate_size + model.hidden_size
    )
    one, seven = per_layer(("q_proj",)), per_layer(tuple(hf_names.projections()))
    assert seven - one < 0.2 * 4 * 512 * outputs
    if remat == "dots":
        assert one > 0.9 * 4 * 512 * outputs  # each product is kept once
