"""lm-evaluation-harness over jlora's engine: the same numbers as its own backend for transformers and PEFT."""

import json
from types import SimpleNamespace

import pytest
import transformers
from conftest import SAMPLE
from programs import run_program

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from jlora import load_model  # noqa: E402
from jlora.evaluation.harness import HarnessModel  # noqa: E402
from jlora.evaluation.subjects import subjects_of  # noqa: E402

TASK = """
task: law_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def subjects(small, places):
    """The base model and two adapters."""
    return subjects_of(load_model(str(small), {name: places[name] for name in ("law", "style")}).generator)


@pytest.fixture(scope="module")
def backends(small, places):
    """The harness' own models by name."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    options = {"pretrained": str(small), "tokenizer": tokenizer, "device": "cpu", "dtype": "float32", "batch_size": 4}
    return {"base": HFLM(**options), "law": HFLM(**options, peft=str(places["law"]))}


def requests(pairs):
    """Requests of the harness' form."""
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_loglikelihoods_equal_those_of_the_harness_own_backend(subjects, backends):
    """100 requests: contexts with and without spaces at their end, an empty one, and one longer than the context."""
    pairs = []
    for pair in SAMPLE[:48]:
        question, answer = (line.split(": ", 1)[1] for line in pair.splitlines()[:2])
        pairs += [(question, f" {answer}"), (f"{question} ", answer[:20])]
    pairs += [("", "Under Article 3."), ("依据第10条", "，应当"), ("A", "B"), ("word " * 3000, "end")]
    assert len(pairs) == 100
    known = {}
    for name, backend in backends.items():
        theirs = backend.loglikelihood(requests(pairs), disable_tqdm=True)
        ours = HarnessModel(subjects, name, known).loglikelihood(requests(pairs), disable_tqdm=True)
        for (value, greedy), (own, own_greedy) in zip(theirs, ours, strict=True):
            assert own == pytest.approx(value, rel=1e-4)
            assert own_greedy == greedy


def test_rolling_likelihoods_and_answers_equal_those_of_the_backend(subjects, backends):
    texts = requests([(text,) for text in (SAMPLE[0], SAMPLE[1] * 3)])
    asked = requests([(pair, {"until": ["."], "max_gen_toks": 12}) for pair in SAMPLE[:4]])
    for name, backend in backends.items():
        model = HarnessModel(subjects, name, {})
        assert model.loglikelihood_rolling(texts) == pytest.approx(backend.loglikelihood_rolling(texts), rel=1e-4)
        assert model.generate_until(asked) == backend.generate_until(asked)


def test_a_task_in_a_local_file_runs_for_every_model(small, places, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"Is {n} even?", "choices": [" yes", " no"], "answer": n % 2} for n in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "law_choice.yaml").write_text(TASK.format(data=data))
    held_out = tmp_path / "eval.txt"
    held_out.write_text("\n\n".join(SAMPLE[40:42]))
    words = ["--adapter", f"law={places['law']}", "--data", held_out, "--output", tmp_path / "out"]
    done = run_program("evaluate", *words, "--tasks", "law_choice", "--task_path", tmp_path, "--limit", "10")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/evaluation.json").read_text())["tasks"]
    assert set(found) == {"base", "law"}
    assert 0 <= found["law"]["law_choice"]["acc,none"] <= 1
    assert "law_choice" in done.stdout
    unknown = run_program("evaluate", *words, "--tasks", "no_such_task")
    assert unknown.returncode == 2
    assert "no_such_task" in unknown.stderr
