"""Training in one process: the loss curve equals PEFT's, frozen weights cost nothing, many devices equal one."""

import dataclasses
import functools
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from programs import Trains

from jlora.adapters import params
from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import tensors, write_adapter
from jlora.adapters.settings import spec_of
from jlora.bases.resolve import resolve_base
from jlora.config.files import load_config
from jlora.data.batches import plan_batches
from jlora.data.readers.files import read_conversations
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.distributed import sharding
from jlora.models import hf_loader
from jlora.models.compute_settings import Packing
from jlora.models.families import read_config
from jlora.planning import data_pipeline
from jlora.steps import optim
from jlora.steps.programs import Programs, fresh_state
from jlora.training import run, setup


class Setup(Trains):
    """All parts of a run from a config file, on some devices."""

    def __init__(self, file, devices=1, attention="xla", **changes):
        self.config = dataclasses.replace(load_config(str(file), []), **changes)
        self.directory = resolve_base(self.config.base_model)
        self.model_config = read_config(self.directory)
        self.tokenizer = load_tokenizer(self.directory, "")
        ends = end_tokens(self.directory, self.tokenizer)
        rows, _ = data_pipeline.read_rows(self.config)
        self.examples = data_pipeline.read_examples(
            self.config, self.tokenizer, ends, rows, "training", self.model_config.vocab_size
        )
        self.mesh = sharding.make_mesh(jax.devices()[:devices], self.config.mesh)
        ways = sharding.data_parallel_size(self.mesh)
        self.steps, batches, _ = data_pipeline.make_run_batches(self.config, self.model_config, self.examples, [], ways)
        self.spec = spec_of(dataclasses.asdict(self.config))
        compute = setup.choose_compute(self.config, jax.devices()[0])
        self.compute = dataclasses.replace(compute, attention=attention, mesh=self.mesh)
        self.graphdef, self.shapes, base_shapes = hf_loader.abstract_model(self.model_config, self.spec, self.compute)
        self.base = hf_loader.load_base(self.directory, base_shapes, self.mesh)
        self.optimizer = optim.make_optimizer(self.config, self.spec, self.steps)
        adapter = run.first_adapter(self.config, self.model_config, self.compute, self.base)
        self.state = fresh_state(adapter, self.optimizer, self.mesh, compute.compute_dtype)
        self.lay(batches)

    def lay(self, batches):
        """Switches to these batches, and compiles programs for them."""
        self.batches, packing = batches, Packing(*batches.packing)
        self.programs = Programs(
            self.graphdef,
            self.base,
            self.optimizer,
            self.mesh,
            packing=packing,
            held_out_packing=packing,
            dropout=self.spec.draws,
            seed=1,
        )

    def held_out_loss(self, adapter):
        return self.programs.held_out_loss(adapter, self.batches, print)


def peft_model(setup, initial, directory, dtype=torch.float32):
    """Returns PEFT's model of a run's base model and this adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns if keys do not match
        tied = setup.model_config.tie_word_embeddings
        config_of_peft = peft_config(setup.spec, str(setup.directory), None, tied=tied)
        write_adapter(initial, setup.spec, config_of_peft, "", directory)
        base = transformers.AutoModelForCausalLM.from_pretrained(setup.directory, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(base, directory, is_trainable=True).to(dtype)


def accumulate_gradients(model, setup, step):
    """Returns the loss of a step on padded examples in torch, whose gradients are added up in the model."""
    config, chosen = setup.config, [setup.examples[i] for i in setup.batches.example_indices(step)]
    total = sum(float(e.weights[1:].sum()) for e in chosen)
    loss_of_step = 0.0
    for start in range(0, len(chosen), config.batch_size):
        micro = chosen[start : start + config.batch_size]
        length = max(len(e.tokens) for e in micro)
        ids = torch.zeros((len(micro), length), dtype=torch.long)
        weights, mask = torch.zeros(ids.shape), torch.zeros_like(ids)
        for i, e in enumerate(micro):
            ids[i, : len(e.tokens)] = torch.tensor(e.tokens)
            weights[i, : len(e.tokens)] = torch.tensor(e.weights)
            mask[i, : len(e.tokens)] = 1
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (each * weights[:, 1:].flatten()).sum() / total
        loss.backward()
        loss_of_step += float(loss.detach())
    return loss_of_step


def peft_losses(setup, initial, directory, count):
    """Trains with PEFT and torch's AdamW on the same padded examples, from the same A and B; returns the losses."""
    config, model = setup.config, peft_model(setup, initial, directory)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    make_schedule = getattr(transformers, f"get_{config.lr_scheduler_type}_schedule_with_warmup")
    schedule = make_schedule(optimizer, int(np.ceil(config.warmup_ratio * setup.steps)), setup.steps)
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        losses.append(accumulate_gradients(model, setup, step))
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
    return np.array(losses)


def weighted(row, weight):
    """Returns the turns of a row, whose answers have a weight."""
    turns = [{"role": message.role, "content": message.content} for message in row.messages]
    return [{**turn, "weight": weight} if turn["role"] == "assistant" else turn for turn in turns]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "linear", "weight_decay": 0.1, "target_modules": ("k_proj", "o_proj", "up_proj")},
    ],
    ids=["cosine", "linear-decay"],
)
def test_the_loss_curve_equals_pefts(config_file, varied_pairs, tmp_path, changes):
    file = config_file(train_data_dir=str(varied_pairs), max_steps=20, learning_rate=5e-3, warmup_ratio=0.1)
    setup = Setup(file, **changes)
    want = peft_losses(setup, setup.state.lora, tmp_path / "initial", 20)
    assert np.abs(setup.losses(20) / want - 1).max() < 1e-5
    assert want[-1] < want[0] - 0.1  # it learns, so the bound is meaningful


@pytest.mark.slow
def test_weighted_losses_and_gradients_equal_pefts(config_file, varied_pairs, tmp_path):
    """Weights of the answers weigh the sum and its divisor; in each of 20 steps, with gradient accumulation.

    PEFT's gradients are those of float64, from jlora's adapter before the step.
    """
    data = tmp_path / "weighted.jsonl"
    rows = zip(read_conversations(str(varied_pairs), "train_data_dir"), itertools.cycle((1, 0.25, 2, 0.001)))
    data.write_text("".join(json.dumps({"messages": weighted(row, weight)}) + "\n" for row, weight in rows))
    file = config_file(train_data_dir=str(data), max_steps=20, learning_rate=5e-3, warmup_ratio=0.1)
    setup = Setup(file, gradient_accumulation_steps=3, batch_size=2, max_seq_length=200)
    curve = peft_losses(setup, setup.state.lora, tmp_path / "initial", 20)
    model = peft_model(setup, setup.state.lora, tmp_path / "exact", torch.float64)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    setup.optimizer = optax.chain(optax.trace(decay=0.0), setup.optimizer)  # whose state is the gradient
    setup.state = fresh_state(setup.state.lora, setup.optimizer, setup.mesh, setup.compute.compute_dtype)
    setup.lay(setup.batches)
    to_peft = functools.partial(tensors, spec=setup.spec, tied=setup.model_config.tie_word_embeddings)
    for step in range(20):
        before = to_peft(setup.state.lora)
        for name, parameter in trained.items():
            parameter.data, parameter.grad = torch.tensor(before[name], dtype=torch.float64), None
        exact = accumulate_gradients(model, setup, step)
        (loss,) = setup.losses(1, first=step)
        assert abs(loss / exact - 1) < 1e-5 and abs(loss / curve[step] - 1) < 1e-5
        gradients = to_peft(setup.state.optimizer[0].trace["lora"])
        assert gradients.keys() == trained.keys()
        ours = np.concatenate([gradients[name].ravel() for name in trained])
        theirs = np.concatenate([parameter.grad.numpy().ravel() for parameter in trained.values()])
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    assert curve[-1] < curve[0] - 0.1


@pytest.mark.slow
def test_the_loss_curve_equals_pefts_on_the_real_model(config_file, tmp_path, smollm):
    setup = Setup(config_file(base_model=str(smollm), max_steps=20, learning_rate=1e-3, lora_rank=16))
    want = peft_losses(setup, setup.state.lora, tmp_path / "initial", 3)
    assert np.abs(setup.losses(3) / want - 1).max() < 1e-4


@pytest.mark.slow
def test_packed_and_padded_losses_are_equal(config_file, varied_pairs):
    setup = Setup(config_file(train_data_dir=str(varied_pairs)))
    adapter = jax.tree.map(lambda x: x + 0.02, setup.state.lora)
    order = {"batch_size": 4, "micro_batches": 1, "steps": setup.steps, "seed": 0, "linear_cost": 1e4}
    padded = plan_batches(setup.examples, devices=4, max_shapes=1, **order)  # a row for each example, all of one length
    packed = plan_batches(setup.examples, devices=1, **order)
    assert padded.rows == 4 and packed.rows < 4
    setup.lay(packed)
    one = setup.held_out_loss(adapter)
    setup.lay(padded)
    other = setup.held_out_loss(adapter)
    assert abs(one / other - 1) < 1e-6
    order["seed"] = 1
    fewer = plan_batches(list(setup.examples)[:-1], devices=1, **order)  # the negative control: one example less
    setup.lay(fewer)
    assert abs(setup.held_out_loss(adapter) / other - 1) > 1e-5


@pytest.mark.slow
def test_sharing_the_prefix_does_not_change_training(config_file, varied_pairs):
    file = config_file(train_data_dir=str(varied_pairs), learning_rate=1e-2)
    once, each = Setup(file), Setup(file)
    order = {"batch_size": 4, "micro_batches": 1, "steps": each.steps, "seed": 0, "linear_cost": 1e4, "max_shapes": 1}
    once.lay(plan_batches(once.examples, devices=1, share=True, **order))
    each.lay(plan_batches(each.examples, devices=1, **order))
    assert once.batches.prefix > 8 and each.batches.prefix == 0
    assert np.abs(once.losses(6) / each.losses(6) - 1).max() < 1e-5
    for a, b in zip(jax.tree.leaves(once.state.lora), jax.tree.leaves(each.state.lora), strict=True):
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


def test_the_prefix_is_shared_only_if_results_stay_the_same(config_file):
    setup = Setup(config_file())

    def prefixes(model=setup.model_config, **changes):
        config = dataclasses.replace(setup.config, **changes)
        _, *both = data_pipeline.make_run_batches(config, model, setup.examples, setup.examples, 1)
        return [batches.prefix for batches in both]

    prefix = setup.batches.prefix
    assert prefixes() == [prefix, prefix] and prefix > 8
    assert prefixes(lora_dropout=0.1) == prefixes(neftune_noise_alpha=5.0) == [0, prefix]  # none where it is evaluated
    assert prefixes(dataclasses.replace(setup.model_config, sliding_window=4096)) == [0, 0]


@pytest.mark.slow
def test_frozen_weights_have_no_optimizer_state(config_file):
    setup = Setup(config_file(learning_rate=1e-2))
    before = jax.tree.map(np.array, setup.base)
    setup.losses(3)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(setup.base), strict=True):
        assert np.array_equal(a, b)
    adapter = sum(x.nbytes for x in jax.tree.leaves(setup.state.lora))
    counters = [x for x in jax.tree.leaves(setup.state.optimizer) if x.ndim == 0]
    assert sum(x.nbytes for x in jax.tree.leaves(setup.state.optimizer) if x.ndim) == 2 * adapter
    assert all(x.dtype == jnp.int32 for x in counters)
    base = sum(x.nbytes for x in jax.tree.leaves(setup.base))
    assert 3 * adapter + 10_000 < base / 20
    for program in setup.programs.compiled.values():  # adapter, moments, counters and metrics come out, nothing else
        assert 3 * adapter <= program.memory_analysis().output_size_in_bytes < 3 * adapter + 10_000


@pytest.mark.slow
def test_eight_devices_equal_one_on_batches_of_all_shapes(config_file, varied_pairs):
    changes = {"batch_size": 8, "learning_rate": 5e-3, "gradient_accumulation_steps": 2}
    file = config_file(train_data_dir=str(varied_pairs), **changes)
    one, eight = Setup(file, devices=1), Setup(file, devices=8)
    assert eight.batches.rows % 8 == 0
    assert np.abs(one.losses(5) - eight.losses(5)).max() < 1e-5
    assert all(len(setup.programs.compiled) == len(setup.batches.shapes) > 1 for setup in (one, eight))
    for a, b in zip(jax.tree.leaves(one.state.lora), jax.tree.leaves(eight.state.lora), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4
    assert len(jax.tree.leaves(eight.state.lora)[0].sharding.device_set) == 8


@pytest.mark.slow
def test_only_the_adapter_is_sent_between_devices(config_file):
    setup = Setup(config_file(batch_size=8), devices=8)
    setup.losses(1)
    (program,) = setup.programs.compiled.values()
    text = program.as_text()
    for operation in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {operation}(" not in text, operation
    assert " all-reduce(" in text


@pytest.mark.slow
def test_dropout_acts_in_training_only_and_differs_by_step(config_file):
    plain, dropped = (Setup(config_file(lora_dropout=rate, learning_rate=1e-9)) for rate in (0.0, 0.5))
    for made in (plain, dropped):  # B must not be zero for dropout to show
        made.state = made.state._replace(lora=jax.tree.map(lambda x: x + 0.05, made.state.lora))
    plain.lay(dropped.batches)
    batch = plain.batches[0]
    held_out = [setup.held_out_loss(setup.state.lora) for setup in (plain, dropped)]
    assert held_out[0] == held_out[1]
    _, want = plain.programs.train_step(plain.state, batch, print)
    state, first = dropped.programs.train_step(dropped.state, batch, print)
    _, second = dropped.programs.train_step(state, batch, print)
    assert abs(float(first.loss) - float(want.loss)) > 1e-4
    assert abs(float(first.loss) - float(second.loss)) > 1e-4


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_schedule_equals_transformers(config_file, kind):
    config = dataclasses.replace(
        load_config(str(config_file()), []), lr_scheduler_type=kind, warmup_ratio=0.1, learning_rate=1.0
    )
    steps = 50
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = {"num_warmup_steps": 5} | ({} if kind == "constant" else {"num_training_steps": steps})
    theirs = transformers.get_scheduler(
        "constant_with_warmup" if kind == "constant" else kind, torch_optimizer, **arguments
    )
    ours = optim.schedule(config, steps)
    for step in range(steps):
        assert abs(float(ours(step)) - theirs.get_last_lr()[0]) < 1e-6, step
        torch_optimizer.step()
        theirs.step()


def test_initial_adapter_is_uniform_within_pefts_bound_and_b_is_zero():
    shapes = {part: jax.ShapeDtypeStruct((2, 8, 16), jnp.float32) for part in ("lora_A", "lora_B")}
    initial = params.init(shapes, jax.random.key(0))
    assert not np.any(initial["lora_B"])
    assert 0.9 / 4 < np.abs(initial["lora_A"]).max() <= 1 / 4  # 1 / sqrt(16)
    assert not np.array_equal(initial["lora_A"][0], initial["lora_A"][1])
