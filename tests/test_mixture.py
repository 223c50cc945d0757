"""Several sets of rows: how often each is seen, in which order, and the held-out loss of each."""

import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_program

from jlora.common.errors import UserError
from jlora.config.files import load_config
from jlora.data.batches import plan_batches
from jlora.data.examples import Example
from jlora.data.mixture import mix, read_share
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.planning import data_pipeline


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.2, 0.5, 1.0, 2.5, 1, 7])), min_size=1, max_size=3),
    st.integers(0, 2**31 - 1),
)
def test_every_example_of_a_set_is_seen_equally_often(sets, seed):
    sources = np.repeat(np.arange(len(sets)), [count for count, _ in sets])
    names = [f"set {number}" for number in range(len(sets))]
    made = mix(names, sources, {name: share for name, (_, share) in zip(names, sets, strict=True)})
    seen, epochs = Counter(), 4
    for epoch in range(epochs):
        order = made.order(seed, epoch)
        again = mix(names, sources, {name: share for name, (_, share) in zip(names, sets, strict=True)})
        assert np.array_equal(order, again.order(seed, epoch)) and len(order) == made.taken
        seen.update(order.tolist())
    for number, (count, share) in enumerate(sets):
        times = [seen[index] for index in np.flatnonzero(sources == number).tolist()]
        taken = share if isinstance(share, int) else max(1, round(share * count))
        assert sum(times) == epochs * taken and max(times) - min(times) <= 1


def test_epochs_and_seeds_differ():
    made = mix(["a", "b"], np.repeat([0, 1], 50), {"a": 0.2, "b": 1.0})
    orders = [made.order(seed, epoch).tolist() for seed, epoch in itertools.product((0, 1), (0, 1, 2))]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert len({index for order in orders[:3] for index in order if index < 50}) == 30  # others in each epoch


@pytest.mark.parametrize(
    ("text", "share"),
    [("1", 1.0), ("0.2", 0.2), ("500 rows", 500), ("1row", 1), ("0", None), ("-1", None), ("x", None)],
)
def test_shares(text, share):
    assert read_share(text) == share and type(read_share(text)) is type(share)


def write_sets(tmp_path):
    for name, count in (("law", 20), ("general", 10)):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {number}?", "completion": f"It is {number}."} for number in range(count)]
        (tmp_path / name / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "law"), str(tmp_path / "general")


def test_the_config_takes_sets_in_every_form(tmp_path):
    law, general = write_sets(tmp_path)
    forms = {
        "mapping": f"train_data_dir: {{{law}: 1, {general}: 0.2}}",
        "mix": f"train_data_mix: {{{law}: 1, {general}: 0.2}}",
        "entries": f"train_data_mix: ['{law}=1', '{general}=0.2']",
    }
    for form in forms.values():
        (tmp_path / "run.yaml").write_text(form)
        assert load_config(str(tmp_path / "run.yaml"), []).train_data_mix == ((law, "1"), (general, "0.2"))
    (tmp_path / "run.yaml").write_text(f"train_data_dir: [{law}, {general}]")
    assert load_config(str(tmp_path / "run.yaml"), []).train_data_mix == ((law, "1"), (general, "1"))
    (tmp_path / "run.yaml").write_text(f"train_data_mix: {{{law}: none of it}}")
    with pytest.raises(UserError, match=r"none of it.: Expected PATH=SHARE"):
        load_config(str(tmp_path / "run.yaml"), [])
    (tmp_path / "run.yaml").write_text(f"train_data_mix: {{{law}: 1}}\ntrain_data_dir: {law}")
    with pytest.raises(UserError, match="train_data_dir and train_data_mix are both set"):
        load_config(str(tmp_path / "run.yaml"), [])


def test_batches_take_the_shares_and_held_out_steps_have_one_set(tmp_path, tiny):
    law, general = write_sets(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"train_data_dir: {{{law}: 1, {general}: 5 rows}}\nbase_model: {tiny}\neval_share: 0.3\nbatch_size: 4"
    )
    config, said = load_config(str(tmp_path / "run.yaml"), []), []
    tokenizer = load_tokenizer(tiny, "")
    rows, held_out = data_pipeline.read_rows(config, said.append)
    assert {row.source for row in rows} == {row.source for row in held_out} == {law, general}
    ends = end_tokens(tiny, tokenizer)
    examples, others = (
        data_pipeline.read_examples(config, tokenizer, ends, some, "rows", tokenizer.vocab_size, said.append)
        for some in (rows, held_out)
    )
    assert [example.source for example in examples] == [row.source for row in rows]
    common = {"batch_size": 4, "micro_batches": 1, "devices": 1, "linear_cost": 1e4}
    shares = {path: read_share(share) for path, share in config.train_data_mix}
    one = plan_batches(
        examples, steps=None, seed=3, mixture=mix(examples.source_names, examples.sources, shares), **common
    )
    chosen = [examples[i].source for step in range(one.steps_per_epoch) for i in one.example_indices(step)]
    assert Counter(chosen) == {law: sum(row.source == law for row in rows), general: 5}
    two = plan_batches(others, steps=None, seed=None, mixture=mix(others.source_names, others.sources, {}), **common)
    steps = [[others[i] for i in two.example_indices(step)] for step in range(two.steps_per_epoch)]
    assert all({example.source for example in some} == {two.set_name(step)} for step, some in enumerate(steps))
    assert sorted(e.where for some in steps for e in some) == sorted(row.where for row in held_out)


def test_examples_in_memory_have_no_sets():
    assert Example(np.zeros(2, np.int32), np.ones(2, np.float32), "x").source == ""


@pytest.mark.slow
def test_a_run_reports_the_loss_of_each_set_and_continues_exactly(config_file, tmp_path):
    law, general = write_sets(tmp_path)
    settings = {"train_data_mix": [f"{law}=1", f"{general}=0.5"], "train_data_dir": "", "eval_share": 0.3}
    settings |= {"batch_size": 4, "max_steps": 8, "save_steps": 4, "eval_steps": 4, "sample_questions": 0}
    file = config_file(**settings)
    done = run_program("jlora.train", "--config", file)
    assert done.returncode == 0, done.stderr
    assert f", {law} " in done.stdout and f", {general} " in done.stdout
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if f"eval_loss/{law}" in line][-1]
    low, high = sorted((last[f"eval_loss/{law}"], last[f"eval_loss/{general}"]))
    assert low <= last["eval_loss"] <= high and low < high
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(weights.parent)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    done = run_program("jlora.train", "--config", file, "--config.resume_from_checkpoint=auto")
    assert "from step 4, exactly" in done.stdout and weights.read_bytes() == whole
