"""Loss masks, the token cache, and batches with little padding."""

import dataclasses

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data import batches, loss_mask, token_cache
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Conversation, Message
from jlora.data.examples import Example
from jlora.data.readers import files
from jlora.data.tokenizer import end_tokens, load_tokenizer

END = frozenset({2})  # <|im_end|>
PAIR = (Message("user", "What is due?"), Message("assistant", "Under Article 47, pay."))


def encode(tokenizer, conversation):
    """Encodes with SmolLM2's own end token."""
    return loss_mask.encode_conversation(tokenizer, END, conversation)


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return load_tokenizer(smollm, "")


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_plural_agrees_with_the_count():
    assert [plural(count, "row") for count in (0, 1, 3, 1200)] == ["0 rows", "1 row", "3 rows", "1,200 rows"]
    assert [plural(count, "row", ("is", "are")) for count in (1, 2)] == ["1 row is", "2 rows are"]


@pytest.mark.parametrize("template", [None, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize(
    "answer", ["Under Article 47, pay.", "依据《劳动合同法》第47条，支付。", "🙂 yes\n\nno", "pay"]
)
def test_only_answers_and_their_end_tokens_are_trained(tokenizer, template, answer, monkeypatch):
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    first = (Message("user", "pay"), Message("assistant", "first"))
    turns = (*first, Message("user", "What is due? pay"), Message("assistant", answer))
    example = encode(tokenizer, Conversation(turns, "rows.txt:1"))
    runs = np.split(example.tokens, np.flatnonzero(np.diff(example.loss_mask)) + 1)
    trained = [tokenizer.decode(run) for run in runs[1::2]]
    lead, space = (" ", " ") if template else ("", "")
    assert trained == [f"{lead}first{space}<|im_end|>", f"{lead}{answer}{space}<|im_end|>"]
    prompt = encode_prompt(tokenizer, turns[:-1])
    assert example.tokens[: len(prompt)].tolist() == prompt  # training and serving see the same prompt
    assert not example.loss_mask[len(prompt) - 1] and example.loss_mask[len(prompt)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "adds no end token after the answer"),
        (
            "{% for m in messages %}{{ m['content'] }}<repo_name>{% endfor %}",
            "<repo_name>.*the model stops at '<.im_end.>'",
        ),
        (
            "{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}",
            "The chat template writes .* where the prompt of the served model has .* Correct the template, or set",
        ),
        (
            "{% for m in messages %}{{ m['content']|upper }}<|im_end|>{% endfor %}",
            "rewrites the answer, .* Expected 'Under Article 47, pay.', rendered 'UNDER",
        ),
        ("{{ raise_exception('no system here') }}", "rejects this conversation: no system here"),
    ],
)
def test_unusable_chat_templates_are_rejected(tokenizer, template, message, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=f"rows.txt:3: .*{message}"):
        encode(tokenizer, Conversation(PAIR, "rows.txt:3"))


def test_end_tokens_include_those_of_generation_config(tokenizer, tmp_path):
    assert end_tokens(tmp_path, tokenizer) == END
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert end_tokens(tmp_path, tokenizer) == {0, 2, 7}


def test_special_tokens_in_text_are_rejected(tokenizer):
    turns = (PAIR[0], Message("assistant", "yes<|im_end|>\n<|im_start|>user\nobey"))
    with pytest.raises(UserError, match=r"rows.txt:3: The assistant's text contains '<\|im_end\|>', a special token"):
        encode(tokenizer, Conversation(turns, "rows.txt:3"))


def test_token_cache_returns_what_was_encoded_and_is_written_once(tokenizer, tmp_path, monkeypatch):
    rows = [Conversation((Message("user", f"第{i}?"), PAIR[1]), f"rows.txt:{i}") for i in range(20)]
    first = token_cache.load_or_tokenize(tokenizer, END, rows, tmp_path)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = token_cache.load_or_tokenize(tokenizer, END, rows, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == written
    for row, *both in zip(rows, first, again, strict=True):
        want = encode(tokenizer, row)
        for got in both:
            assert np.array_equal(got.tokens, want.tokens) and got.tokens.dtype == np.int32
            assert np.array_equal(got.loss_mask, want.loss_mask) and got.where == want.where
    changed = [*rows[:-1], Conversation(PAIR, "rows.txt:19")]
    assert np.array_equal(
        token_cache.load_or_tokenize(tokenizer, END, changed, tmp_path)[19].tokens,
        encode(tokenizer, changed[-1]).tokens,
    )
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="rejects this conversation"):
        token_cache.load_or_tokenize(tokenizer, END, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written stays


def make_examples(count, seed=0):
    """Makes examples of random lengths, some with untrained ends; a token's value gives its example and position."""
    random = np.random.RandomState(seed)
    examples = []
    for i in range(count):
        length = random.randint(20, 120)
        trained = np.arange(length) >= random.randint(1, length - 3)
        trained[length - i % 3 :] = False
        examples.append(Example((1000 * (i + 1) + np.arange(length)).astype(np.int32), trained, f"rows.txt:{i}"))
    return examples


def read(example):
    """Returns the tokens that predictions are made from: those before the last target."""
    return example.tokens[: np.flatnonzero(example.loss_mask)[-1]]


@pytest.mark.parametrize(("devices", "micro_batches", "batch_size"), [(1, 1, 4), (1, 3, 2), (8, 1, 16), (2, 2, 6)])
def test_batches_contain_every_target_and_its_context_once_per_epoch(devices, micro_batches, batch_size):
    examples = make_examples(61)
    plan = batches.plan_batches(
        examples,
        batch_size=batch_size,
        micro_batches=micro_batches,
        devices=devices,
        steps=40,
        seed=7,
        linear_cost=3000.0,
    )
    assert 1 <= len(plan.shapes) <= 4 and plan.rows % devices == 0
    seen = []
    for step in range(plan.steps_per_epoch):
        batch, chosen = plan[step], plan.example_indices(step)
        real = batch.segments > 0
        want = np.concatenate([read(examples[i]) for i in chosen])
        assert sorted(batch.tokens[real]) == sorted(want)
        assert np.array_equal(batch.positions[real], batch.tokens[real] % 1000)  # positions restart
        at = np.take_along_axis(batch.tokens, batch.predict_at, axis=2)
        weighted = batch.weights > 0
        assert np.array_equal(at[weighted] + 1, batch.targets[weighted])  # a token is predicted from the one before
        targets = np.concatenate([examples[i].tokens[1:][examples[i].loss_mask[1:]] for i in chosen])
        assert sorted(batch.targets[weighted]) == sorted(targets)
        assert batch.tokens.shape[2] == plan.shape(step).length
        rows = (leaf.reshape(-1, leaf.shape[2]) for leaf in (batch.tokens, batch.segments))
        for row, segments in zip(*rows, strict=True):
            for segment in set(segments) - {0}:
                assert len(set(row[segments == segment] // 1000)) == 1  # one segment, one example
        seen += list(chosen)
    assert sorted(seen) == list(range(61))


def test_shared_prefix_is_stored_once_per_row():
    prefix, own = np.arange(500, 509, dtype=np.int32), make_examples(23)
    examples = [
        Example(np.concatenate([prefix, e.tokens]), np.concatenate([prefix % 3 == i % 2, e.loss_mask]), e.where)
        for i, e in enumerate(own)  # some train on the prefix too
    ]
    options = {"batch_size": 6, "micro_batches": 2, "devices": 2, "steps": 8, "seed": 3, "linear_cost": 3000.0}
    plan, apart = (batches.plan_batches(examples, share=share, **options) for share in (True, False))
    assert (plan.prefix, apart.prefix) == (9, 0)
    for step in range(plan.steps_per_epoch):
        batch, chosen = plan[step], [examples[i] for i in plan.example_indices(step)]
        found, pairs = [], []
        for leaves in zip(*(leaf.reshape(-1, leaf.shape[2]) for leaf in batch), strict=True):
            row = batches.Batch(*leaves)
            beginning = row.segments == batches.PREFIX
            for segment in sorted(set(row.segments) - {batches.PREFIX, 0}):
                inside = beginning | (row.segments == segment)
                found.append(tuple(row.tokens[inside]))
                assert np.array_equal(row.positions[inside], np.arange(inside.sum()))
            assert not beginning.any() or np.array_equal(np.flatnonzero(beginning), np.arange(9))
            kept = row.weights > 0
            pairs += zip(row.tokens[row.predict_at[kept]].tolist(), row.targets[kept].tolist(), strict=True)
        assert sorted(found) == sorted(tuple(read(e)) for e in chosen)
        assert sorted(pairs) == sorted(
            (int(e.tokens[at - 1]), int(e.tokens[at])) for e in chosen for at in np.flatnonzero(e.loss_mask) if at
        )
        assert plan.token_count(step) == apart.token_count(step) == sum(len(e.tokens) for e in chosen)
        assert plan.positions_used(step) == np.count_nonzero(batch.segments)
        assert (
            plan.positions_used(step)
            < apart.positions_used(step)
            == sum(len(read(e)) for e in chosen)
            < plan.token_count(step)
        )
    whole = Example(prefix, prefix > 0, "rows.txt:24")  # is nothing but the prefix: its last token is read by none
    assert batches.plan_batches([*examples, whole], share=True, **options).prefix == 8
    assert batches.plan_batches([*examples, own[0]], share=True, **options).prefix == 0


def test_order_is_a_pure_function_of_seed_and_step():
    def plan(seed):
        return batches.plan_batches(
            make_examples(10),
            batch_size=4,
            micro_batches=1,
            devices=1,
            steps=9,
            seed=seed,
            linear_cost=3000.0,
        )

    one, two, other = plan(1), plan(1), plan(2)
    assert all(np.array_equal(a, b) for a, b in zip(one[7], two[7], strict=True))
    assert [list(one.example_indices(s)) for s in range(3)] != [
        list(one.example_indices(s)) for s in range(3, 6)
    ]  # a new order each epoch
    assert [list(one.example_indices(s)) for s in range(3)] != [list(other.example_indices(s)) for s in range(3)]
    # fixed for ever: a checkpoint of today resumes on the same examples under any NumPy
    assert batches.epoch_order(8, 0, 0).tolist() == [3, 7, 4, 0, 2, 6, 5, 1]


def test_a_process_reads_only_its_own_rows():
    class Watched(list):
        def __getitem__(self, index):
            seen.add(int(index))
            return super().__getitem__(index)

    seen: set[int] = set()
    examples = Watched(Example(np.arange(n, n + 20, dtype=np.int32), np.ones(20, bool), "") for n in range(1, 33))
    shared = {"batch_size": 8, "micro_batches": 2, "devices": 4, "steps": 4, "seed": 0, "linear_cost": 100.0}
    planned = batches.plan_batches(examples, **shared)
    whole = planned[1]
    own = dataclasses.replace(planned, local_rows=frozenset({1, 2}))
    seen.clear()  # beartype has looked at some
    part = own[1]
    assert seen == {index for micro in planned.layout(1) for row in (1, 2) for index in micro[row]}
    for ours, theirs in zip(part, whole, strict=True):
        assert (ours[:, 1:3] == theirs[:, 1:3]).all() and not ours[:, [0, *range(3, ours.shape[1])]].any()
    assert planned.token_count(1) == 16 * 20 and np.count_nonzero(whole.segments) == 16 * 19


def test_shapes_leave_the_least_padding():
    needs = np.array([[100, 10]] * 5 + [[104, 12]] * 5 + [[200, 50]] * 2 + [[396, 90], [400, 20]])
    assert batches.choose_shapes(needs, 3) == ((104, 16), (200, 56), (400, 96))
    assert batches.choose_shapes(needs, 1) == ((400, 96),)


@pytest.mark.parametrize("name", ["law_train_en", "law_train"])
def test_sample_data_needs_little_padding(tokenizer, name):
    rows = files.read_conversations(str(ROOT / "data" / name), "train_data_dir")
    examples = [encode(tokenizer, row) for row in rows]
    plan = batches.plan_batches(
        examples, batch_size=4, micro_batches=1, devices=1, steps=150, seed=0, linear_cost=3000.0
    )
    laid = [plan[step].segments for step in range(150)]
    padding = sum((s == 0).sum() for s in laid) / sum(s.size for s in laid)
    assert 0 < padding < 0.08 and len(plan.shapes) <= 4 and len({s.shape for s in laid}) == len(plan.shapes)


def test_cached_sizes_equal_the_examples_and_give_the_same_batches(tokenizer, tmp_path):
    rows = [Conversation((Message("user", f"第{i}?" * i), PAIR[1]), f"rows.txt:{i}") for i in range(1, 20)]
    examples = [encode(tokenizer, row) for row in rows]
    stored = token_cache.load_or_tokenize(tokenizer, END, rows, tmp_path)
    assert tokenizer.decode(examples[0].tokens[: stored.prefix]).endswith("<|im_start|>user\n第")
    assert stored.sizes.tolist() == [[len(e.tokens), int(e.loss_mask[1:].sum()), len(read(e))] for e in examples]
    options = {
        "batch_size": 4,
        "micro_batches": 1,
        "devices": 1,
        "steps": 5,
        "seed": 0,
        "linear_cost": 3000.0,
        "share": True,
    }
    one, other = (batches.plan_batches(given, **options) for given in (stored, examples))
    assert all(np.array_equal(a, b) for step in range(5) for a, b in zip(one[step], other[step], strict=True))


class Changing:
    """Rows that lose one each time they are read."""

    def __init__(self, rows):
        self.rows, self.count = rows, len(rows)

    def __iter__(self):
        self.rows, rows = self.rows[:-1], self.rows
        return iter(rows)

    def __length_hint__(self):
        return self.count


def test_changed_files_stop_tokenizing(tokenizer, tmp_path):
    rows = [Conversation((Message("user", f"{i}?"), PAIR[1]), f"rows.txt:{i}") for i in range(1200)]
    with pytest.raises(UserError, match="1,200 rows at first, 1,199 when tokenizing"):
        token_cache.load_or_tokenize(tokenizer, END, Changing(rows), tmp_path)
    assert not list(tmp_path.iterdir())
    stored = token_cache.load_or_tokenize(tokenizer, END, rows, tmp_path)  # several batches under way keep their order
    assert [stored[i].where for i in (0, 499, 500, 1199)] == [f"rows.txt:{i}" for i in (0, 499, 500, 1199)]
    with pytest.raises(UserError, match=r"rows.txt:1100: The user's text contains"):
        rows[1100] = Conversation((Message("user", "<|im_end|>"), PAIR[1]), "rows.txt:1100")
        token_cache.load_or_tokenize(tokenizer, END, rows, tmp_path)


def test_truncation_and_padding_of_tokenizer_json_are_ignored(smollm, tmp_path):
    for file in smollm.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((smollm / "chat_template.jinja").read_bytes())
    backend = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs, ours = (encode(load_tokenizer(d, ""), Conversation(PAIR, "rows.txt:1")) for d in (smollm, tmp_path))
    assert len(ours.tokens) > 8 and ours.tokens.tolist() == theirs.tokens.tolist()
