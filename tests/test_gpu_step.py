"""The whole training step on an H100, compiled by XLA's CUDA compiler without one: cuDNN in the loop over layers."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from test_cudnn import NEEDS_COMPILER, compiled

from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.models import cudnn_attention
from jlora.models.compute_settings import ComputeSettings, Packing
from jlora.models.families import read_config
from jlora.models.unpack_examples import slot_sizes
from jlora.planning import hardware
from jlora.planning.forecast import make_job, make_run_programs
from jlora.planning.hlo import SHAPE, Program
from jlora.steps import compilation
from jlora.steps.programs import batch_shapes

pytestmark = [*NEEDS_COMPILER, pytest.mark.slow]
L = 3
LAW = 1, Shape(320, 208), Packing(24, 4, 83)  # the rows of configs/law.py
LONG = 4, Shape(4096, 2048), Packing(0, 12, 1400)
LONGEST = 4, Shape(32768, 16384), Packing(0, 12, 11200)


@pytest.fixture(scope="module")
def step(smollm):
    """Returns a function of rows that compiles the step of a base with SmolLM2's layers, but few, and few tokens."""
    model = dataclasses.replace(read_config(smollm), num_hidden_layers=L, vocab_size=500)
    target = hardware.find_target("gpu:h100", jax.devices()[:1])
    config = dataclasses.replace(Config(), remat="dots", mesh={})

    @functools.cache
    def compile_step(rows, shape, packing, team=0):
        compute = ComputeSettings(jnp.bfloat16, jnp.bfloat16, attention="cudnn")
        job = make_job(config, model, compute, target, lambda config, ways: (1, rows, shape, packing))
        programs, state = make_run_programs(dataclasses.replace(job, team=team), 100)
        batch = batch_shapes(1, rows, shape, job.mesh, state.step.shape)
        return programs.compile_training(state, batch, lambda line: None)

    return compile_step


def lengths_of(length, packing):
    """The length of a row, and those of its slots with the prefix."""
    return {length, *(packing.prefix + size for size in slot_sizes(length, *packing, multiple=cudnn_attention.BLOCK))}


def calls_and_scores(program, lengths):
    """How often each call of cuDNN runs, forward and backward; and the shapes that have two of these lengths."""
    calls, text = {"Softmax": [], "SoftmaxBackward": []}, program.as_text()
    for instruction, times, _ in Program(text).executions():
        if name := re.search(r'custom_call_target="__cudnn\$fmha(\w+)"', instruction.attributes):
            calls[name[1]].append(times)
    shapes = {dims for _, dims in SHAPE.findall(text)}
    return calls, [dims for dims in shapes if sum(int(n) in lengths for n in dims.split(",") if n) > 1]


@pytest.mark.parametrize(("rows", "shape", "packing"), [LAW, LONG, LONGEST])
def test_each_layer_calls_cudnn_and_holds_no_scores(step, rows, shape, packing):
    """Inside the loop over the layers, once for each size of slots."""
    lengths = lengths_of(shape.length, packing)
    calls, scores = calls_and_scores(step(rows, shape, packing), lengths)
    each = [L] * len(lengths - {shape.length})
    assert calls == {"Softmax": each, "SoftmaxBackward": each}
    assert not scores


def test_adapters_that_train_in_one_step_share_the_base_and_the_calls_of_cudnn(step):
    rows, shape, packing = LAW
    lengths = lengths_of(shape.length, packing)
    one, three = step(rows, shape, packing, 1), step(rows, shape, packing, 3)
    assert calls_and_scores(three, lengths) == calls_and_scores(one, lengths)
    sizes = [program.memory_analysis().argument_size_in_bytes for program in (one, three)]
    state = step(rows, shape, packing).memory_analysis()
    assert sizes[1] - sizes[0] < 2.1 * state.output_size_in_bytes  # two more adapters with their optimizer states


def test_without_cudnn_scores_would_be_found(monkeypatch):
    """The negative control of the test above: the same attention alone, in XLA."""
    monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")
    rows, (length, _), packing = LAW
    calls, scores = calls_and_scores(compiled(length, packing, N=9, K=3, H=64, rows=rows), lengths_of(length, packing))
    assert calls == {"Softmax": [], "SoftmaxBackward": []} and scores


def test_memory_is_linear_in_the_length(step):
    short, long = (step(*rows).memory_analysis().temp_size_in_bytes for rows in (LONG, LONGEST))
    assert long < 8.2 * short


def copied_weights(program, model):
    """The kernels other than products that write a weight of a layer, or many at once."""
    D, F, keys = model.hidden_size, model.intermediate_size, model.num_key_value_heads * model.head_dim
    weights = {(D, D), *itertools.permutations((D, F)), *itertools.permutations((D, keys))}

    def written(shape):
        sizes = [tuple(int(n) for n in dims.split(",") if n not in ("", "1")) for _, dims in SHAPE.findall(shape)]
        return {size[-2:] for size in sizes}

    kernels = Program(program.as_text()).kernels()
    others = [own for own in kernels if own.kind not in ("cuBLAS", "Triton product", "cuDNN")]
    return [own.instruction.name for own in others if written(own.instruction.shape) & weights]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the CUDA compiler of jax 0.10 copies weights")
def test_no_weight_is_copied_outside_of_a_product(step, smollm, monkeypatch):
    model = read_config(smollm)
    assert not copied_weights(step(*LAW), model)
    monkeypatch.setitem(compilation.OPTIONS, "gpu", {})
    assert copied_weights(step.__wrapped__(*LAW), model)  # the negative control
