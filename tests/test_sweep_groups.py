"""Groups of rows that are left out one at a time: which rows they have, and whether planted wrong answers are found."""

import dataclasses
import json
import random

import numpy as np
import pytest
from programs import losses_of, run_program, short_run

from jlora import UserError
from jlora.common.statistics import adjusted
from jlora.config.schema import Config
from jlora.data.batches import plan_batches
from jlora.data.examples import Example
from jlora.sweep.groups import find_groups

TOPICS = ("contracts", "wages", "hours", "leave", "notice", "union")
WRONG = ("wages", "leave")


def lines_of(rows):
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Six topics of six rows; the answers of two topics are wrong. And twelve held-out rows, which are right."""
    root = tmp_path_factory.mktemp("planted")
    wrong = {"answer": "No, not at all, never.", True: "Yes, by law, always."}
    rows = [
        {
            "prompt": f"Is rule {i} on {topic} binding?",
            "response": wrong["answer" if topic in WRONG else True],
            "topic": topic,
        }
        for i in range(6)
        for topic in TOPICS
    ]
    (root / "rows").mkdir()
    (root / "rows/rows.jsonl").write_text(lines_of(rows))
    held_out = [{"prompt": f"Is rule {i} on pay binding?", "response": wrong[True]} for i in range(12)]
    (root / "held_out.jsonl").write_text(lines_of(held_out))
    return root


def sweep(tiny, root, output, *words, **changes):
    """Runs `jlora sweep` on the planted rows."""
    file = output.with_suffix(".yaml")
    settings = {"eval_data_dir": str(root / "held_out.jsonl"), "learning_rate": 1e-2, "max_steps": 18, "eval_steps": 9}
    file.write_text(json.dumps(short_run(tiny, root / "rows", output, **{**settings, "batch_size": 6, **changes})))
    return run_program("sweep", "--config", file, *words)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_twenty_wrong_answers_among_two_hundred_are_found_and_no_clean_group_is_blamed(tiny, tmp_path, seed):
    """Four groups of five wrong answers, and six groups of five right ones; the other rows are in no group."""
    chance = random.Random(seed)
    names = [f"author {i}" for i in range(10) for _ in range(5)] + [None] * 150
    chance.shuffle(names)
    bad = {f"author {i}" for i in chance.sample(range(10), 4)}
    wrong = ("No, not at all, never.", "Nobody knows that, sorry.", "Only on Sundays, I think.")
    rows = [
        {
            "prompt": f"Is rule {i} on {chance.choice(TOPICS)} binding?",
            "response": chance.choice(wrong) if name in bad else "Yes, by law, always.",
            "author": name,
        }
        for i, name in enumerate(names)
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.jsonl").write_text(lines_of(rows))
    held_out = [{"prompt": f"Is rule {i} on pay binding?", "response": "Yes, by law, always."} for i in range(20)]
    (tmp_path / "held_out.jsonl").write_text(lines_of(held_out))
    settings = {"batch_size": 8, "max_steps": 25, "eval_steps": 25, "logging_steps": 25, "learning_rate": 2e-3}
    words = ("--groups", "author", "--sweep.seed=0,1,2,3,4", "--sweep.together=11")
    done = sweep(tiny, tmp_path, tmp_path / "out", *words, **settings)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/sweep.json").read_text())["groups"]
    assert {own["group"] for own in found if own["verdict"] == "harms"} == bad, done.stdout
    assert "4 groups harm the held-out loss" in done.stdout
    first = next(name for name in dict.fromkeys(own["group"] for own in found))
    places = ", ".join(f"rows.jsonl:{i}" for i, name in enumerate(names, 1) if name == first)
    assert f"{first}: {places}" in done.stdout
    assert places in (tmp_path / "out/sweep.html").read_text()
    assert not (tmp_path / "out/adapter").exists()


def test_the_effect_is_the_difference_of_two_trainings(tiny, planted, tmp_path):
    """Each in turn and three in one step: the same losses, and with all rows those of a run of its own."""
    words = ("--groups", "topic", "--sweep.seed=0,1", "--sweep.together=3")
    assert sweep(tiny, planted, tmp_path / "teams", *words, max_steps=4, eval_steps=4).returncode == 0
    assert sweep(tiny, planted, tmp_path / "turns", *words[:3], max_steps=4, eval_steps=4).returncode == 0
    found = json.loads((tmp_path / "turns/sweep.json").read_text())["groups"]
    last = {}
    for trial in (tmp_path / "turns/trials").glob("*/*"):
        name = trial.relative_to(tmp_path / "turns/trials")
        own, theirs = losses_of(trial), losses_of(tmp_path / "teams/trials" / name)
        np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)
        lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        last[str(name)] = lines[-1]["eval_loss"]
    assert len(last) == 2 * 7
    effects = {own["group"]: own["effect"] for own in found}
    for number, topic in enumerate(TOPICS, 1):
        pairs = [last[f"seed={seed}/all-rows"] - last[f"seed={seed}/without-group-{number}"] for seed in (0, 1)]
        assert effects[topic] == pytest.approx(np.mean(pairs), abs=1e-6)
    file = (tmp_path / "turns").with_suffix(".yaml")
    assert run_program("train", "--config", file, f"--config.output_dir={tmp_path}/alone").returncode == 0
    own, theirs = losses_of(tmp_path / "turns/trials/seed=0/all-rows"), losses_of(tmp_path / "alone")
    np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)


def test_with_folds_a_group_is_not_judged_by_its_own_rows(tiny, planted, tmp_path):
    """Its own rows, which are wrong, are easier with the group: their losses alone would speak for it."""
    done = sweep(tiny, planted, tmp_path / "out", "--groups", "topic", "--sweep.folds=3", eval_data_dir="")
    assert done.returncode == 0, done.stderr
    found = {own["group"]: own for own in json.loads((tmp_path / "out/sweep.json").read_text())["groups"]}
    assert all(found[topic]["effect"] > 0 for topic in WRONG)
    assert all(found[topic]["effect"] < 0 for topic in TOPICS if topic not in WRONG)


def test_the_kinds_of_groups(tmp_path):
    """By file, near-duplicates, what the report on the data names, and a column."""
    (tmp_path / "rows").mkdir()
    words = "wages hours leave notice union contract dismissal overtime".split()
    first = [
        {"prompt": f"Question {i}?", "response": f"Text on {word}. ".join(words[i:] + words[:i]), "topic": i % 2}
        for i, word in enumerate(words)
    ]
    second = [
        {"prompt": "Question 0?", "response": "Something else altogether, which was never agreed on by anyone."},
        {"prompt": "Question 3?", "response": first[3]["response"] + "!"},
        {"prompt": "Question 9?", "response": "No."},
    ]
    (tmp_path / "rows/a.jsonl").write_text(lines_of(first))
    (tmp_path / "rows/b.jsonl").write_text(lines_of(second))
    config = dataclasses.replace(Config(), train_data_dir=str(tmp_path / "rows"))

    def groups(kind):
        return {group.name: {place.rpartition("/")[2] for place in group.rows} for group in find_groups(config, kind)}

    assert {name: len(rows) for name, rows in groups("file").items()} == {"a.jsonl": 8, "b.jsonl": 3}
    assert groups("duplicates") == {"near-duplicates 1": {"a.jsonl:4", "b.jsonl:2"}}
    assert groups("topic") == {"0": {f"a.jsonl:{i}" for i in (1, 3, 5, 7)}, "1": {f"a.jsonl:{i}" for i in (2, 4, 6, 8)}}
    named = groups("report")
    assert {"a.jsonl:1", "b.jsonl:1"} in named.values()
    assert named["unusually short answers"] == {"b.jsonl:3"}
    with pytest.raises(UserError, match="--groups colour: Expected file, duplicates, report, or the name of a column"):
        groups("colour")


def test_rows_without_weight_keep_their_places():
    examples = [Example(np.arange(i + 3, dtype=np.int32), np.ones(i + 3, np.float32), f"f:{i}") for i in range(8)]
    batches = plan_batches(
        examples, batch_size=4, micro_batches=1, devices=1, steps=2, seed=0, linear_cost=1e4, max_shapes=1
    )
    mask = np.arange(8) % 3 == 0
    without = dataclasses.replace(batches, left_out=mask)
    for step in range(2):
        whole, some = batches[step], without[step]
        np.testing.assert_array_equal(whole.tokens, some.tokens)
        own = sum(len(examples[i].tokens) - 1 for i in batches.example_indices(step) if not mask[i])
        assert some.weights.sum() == own < whole.weights.sum()


def test_p_values_are_adjusted_for_the_number_of_groups():
    """Benjamini and Hochberg 1995: p times the number of groups, divided by the rank."""
    assert adjusted([0.01, 0.04, 0.5, 0.02]) == pytest.approx([0.04, 0.04 * 4 / 3, 0.5, 0.04])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--groups", "topic", "--sweep.lora_rank=2,4"), "set only seed and folds"),
        (("--groups", "topic", "--sweep.seed=0"), "needs at least two seeds or folds"),
        (("--groups", "colour"), "no row is in a group"),
        (("--groups", "file"), "all rows are in one group"),
        (
            ("--groups", "prompt", "--sweep.folds=3"),
            "The sweep has 111 trainings (1 setting; 3 folds; 36 groups, and all",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tiny, planted, tmp_path, words, message):
    done = sweep(tiny, planted, tmp_path / "out", *words)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Compiling" not in done.stdout
