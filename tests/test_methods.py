"""The parts of every adapter method agree, for each method of the registry and for all combinations.

Registering a new variant is enough to test it here. test_variants.py compares the known ones with PEFT itself.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.adapters import params, peft_io, plain_lora
from jlora.adapters.conflicts import find_conflicts
from jlora.adapters.methods import AXES, LEAVES, METHODS, make_method, method_class, training_labels
from jlora.adapters.methods.method import FROZEN, Frozen
from jlora.adapters.peft_config import peft_config, read_spec
from jlora.adapters.spec import AdapterSpec
from jlora.config.schema import CHOICES, Config
from jlora.distributed.sharding import partition_spec

L, SIZES = 3, {"self_attn.q_proj": (8, 12), "mlp.down_proj": (12, 8)}  # inputs, outputs
PLAIN = AdapterSpec(
    rank=4,
    alpha=6.0,
    dropout=0.0,
    target_modules=("q_proj", "down_proj"),
    feedforward_modules=("down_proj",),
)
PATTERNED = dataclasses.replace(
    PLAIN,
    rank_pattern=(("layers.0.self_attn.q_proj", 2),),
    alpha_pattern=(("down_proj", 5.0),),
    layers_to_transform=(0, 2),
)


def combinations():
    """Yields a spec for every combination of methods: each config key that selects one has each value, or none."""
    for core in (method for method in METHODS if method.chosen_by[0] == "peft_type"):
        values = {}
        for key, value in (method.chosen_by for method in METHODS if method.peft_type == core.peft_type):
            values.setdefault(key, [core.peft_type] if key == "peft_type" else [None]).append(value)
        for chosen in {tuple(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())}:
            # where a key has no effect, the spec of a run has none either
            plain = PLAIN if "rank_pattern" in core.unused else PATTERNED
            spec = dataclasses.replace(plain, **{key: value for key, value in chosen if value is not None})
            if not find_conflicts(spec):
                yield spec


@pytest.fixture(scope="module")
def base():
    random = np.random.RandomState(0)
    return params.build(
        {
            ("layers", *name.split(".")): {
                "weight": random.standard_normal((L, outputs, inputs)).astype(np.float32),
                "bias": random.standard_normal((L, outputs)).astype(np.float32),
            }
            for name, (inputs, outputs) in SIZES.items()
        }
    )


class Case:
    """One spec, with its initial adapter, and one whose trained arrays have moved within each layer's rank."""

    def __init__(self, spec, base):
        self.spec, self.base = spec, base
        shapes = self.shapes_of(spec)
        self.first = jax.jit(lambda base: params.start(spec, shapes, base, jax.random.key(0)))(base)
        self.adapter, random = jax.tree.map(np.array, self.first), np.random.RandomState(1)
        for path, leaves in params.modules(self.adapter):
            for leaf in make_method(spec, params.projection(path)).leaves():
                for layer, rank in enumerate(spec.ranks(params.projection(path), L)):
                    if rank and leaf.rate != FROZEN:
                        own = leaf.cut(leaves[leaf.name][layer], rank)
                        own += 0.3 * random.standard_normal(own.shape).astype(np.float32)

    @staticmethod
    def shapes_of(spec):
        made = {}
        for name, sizes in SIZES.items():
            method = make_method(spec, name)
            shapes = method.shapes(max(method.site(L).ranks), *sizes).items()
            made["layers", *name.split(".")] = {leaf: np.zeros((L, *shape), np.float32) for leaf, shape in shapes}
        return jax.eval_shape(lambda: params.build(made))

    def outputs(self, adapter):
        """Returns the output with the adapter, by projection and layer."""

        def run(adapter):
            return {
                (method.module, layer): method.apply(inputs(method), self.frozen(method, layer), leaves, scale, None)
                for method, leaves, layer, scale in places(self.spec, adapter)
            }

        return as_arrays(jax.jit(lambda adapter: list(run(adapter).values()))(adapter))

    def merged_outputs(self, adapter, spec=None):
        """Returns the output with the adapter merged into weight and bias."""

        def run(adapter):
            for method, leaves, layer, scale in places(spec or self.spec, adapter):
                part = self.frozen(method, layer)
                weight, bias = part.weight, part.bias[0, 0]
                if scale:
                    weight, bias = method.merge(weight, leaves, scale), method.merge_bias(bias, leaves, scale)
                yield jnp.einsum("BTi,oi->BTo", inputs(method), weight) + bias[None, None]

        return as_arrays(jax.jit(lambda adapter: list(run(adapter)))(adapter))

    def base_outputs(self):
        """Returns the output without the adapter."""
        parts = [(m, self.frozen(m, layer)) for m, _, layer, _ in places(self.spec, self.adapter)]
        return [np.einsum("BTi,oi->BTo", inputs(m), part.weight) + np.asarray(part.bias) for m, part in parts]

    def frozen(self, method, layer):
        """One layer of a projection of the base model."""
        part = self.base["layers"]
        for key in method.module.split("."):
            part = part[key]
        weight, bias = jnp.asarray(part["weight"][layer]), jnp.asarray(part["bias"][layer])
        return Frozen(weight, bias[None, None], lambda x: jnp.einsum("BTi,oi->BTo", x, weight))


def inputs(method):
    shape = (2, 5, SIZES[method.module][0])
    return jnp.asarray(np.random.RandomState(2).standard_normal(shape).astype(np.float32))


def places(spec, adapter):
    """Every projection of every layer: method, leaves, layer, scale."""
    for path, leaves in sorted(params.modules(adapter)):
        method = make_method(spec, params.projection(path))
        for layer, scale in enumerate(method.site(L).scales):
            yield method, {name: values[layer] for name, values in leaves.items()}, layer, scale


def as_arrays(values):
    return [np.asarray(value) for value in values]


def differences(one, other):
    """The largest difference of each output."""
    return [np.abs(a - b).max() for a, b in zip(one, other, strict=True)]


@pytest.fixture(scope="module", params=sorted(combinations(), key=str), ids=lambda spec: method_class(spec).__name__)
def case(request, base):
    return Case(request.param, base)


def test_initial_and_neutral_values_change_nothing(case):
    off = jax.jit(params.neutral, static_argnums=0)(case.spec, case.adapter, case.base)
    for adapter in (case.first, off):
        assert max(differences(case.outputs(adapter), case.base_outputs())) < 1e-4


def test_merge_equals_apply(case):
    outputs = case.outputs(case.adapter)
    assert max(differences(outputs, case.merged_outputs(case.adapter))) < 1e-4
    ranks = [rank for name in sorted(SIZES) for rank in case.spec.ranks(name, L)]
    assert [change > 0.1 for change in differences(outputs, case.base_outputs())] == [rank > 0 for rank in ranks]


def test_peft_files_round_trip(case, tmp_path):
    config = peft_config(case.spec, "base", None, tied=False)
    peft_io.write_adapter(case.adapter, case.spec, config, "", tmp_path / "adapter")
    spec = read_spec(tmp_path / "adapter", L)
    read = peft_io.read_adapter(tmp_path / "adapter", spec, case.shapes_of(spec), tied=False)
    assert max(differences(case.merged_outputs(case.adapter), case.merged_outputs(read, spec))) < 1e-4
    one, other = (peft_io.tensors(*form, tied=False) for form in ((case.adapter, case.spec), (read, spec)))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_portable_form_is_equal_or_refused(case):
    assert bool(plain_lora.unsupported_as_lora(case.spec)) != method_class(case.spec).portable
    if method_class(case.spec).portable:
        adapter, spec = plain_lora.to_plain_lora(case.adapter, case.spec)
        assert max(differences(case.merged_outputs(case.adapter), case.merged_outputs(adapter, spec))) < 1e-4


def test_every_array_that_trains_has_a_gradient(case):
    rates = training_labels(case.spec)

    def loss(adapter):
        return sum(
            jnp.sum(method.apply(inputs(method), case.frozen(method, layer), leaves, scale, None) ** 2)
            for method, leaves, layer, scale in places(case.spec, adapter)
        )

    for path, leaves in params.modules(jax.jit(jax.grad(loss))(case.adapter)):
        for layer, rank in enumerate(case.spec.ranks(params.projection(path), L)):
            taken = {name for name, gradient in leaves.items() if np.any(np.asarray(gradient[layer]) != 0)}
            trains = {name for name in leaves if rates[name] != FROZEN}
            assert (trains <= taken) if rank else not taken


def test_leaf_names_and_config_keys_are_consistent(case):
    method = method_class(case.spec)
    keys = {field.name for field in dataclasses.fields(Config)}
    assert method.chosen_by[0] in keys and set(method.unused) <= keys
    for leaf in method.leaves():  # a name has one meaning, whatever methods have such an array
        assert (leaf.axes, leaf.draw) == (LEAVES[leaf.name].axes, LEAVES[leaf.name].draw)
        for projection, axis in (("layers/self_attn/q_proj", "o"), ("layers/self_attn/o_proj", "i")):
            split = partition_spec(f"state/{projection}/{leaf.name}", AXES)
            assert [part == "tensor" for part in split][1:] == [own == axis for own in leaf.axes if axis in leaf.axes]
    assert all(value in CHOICES[key] for key, value in (m.chosen_by for m in METHODS) if key in CHOICES)
