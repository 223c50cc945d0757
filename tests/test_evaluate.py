"""`jlora evaluate`: figures that repeat, an evaluation that continues, recited rows, personal data, and the report."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SAMPLE
from programs import command, process_options, run_program, wait_for

from jlora.data.conversation import Conversation, Message
from jlora.evaluation import leaks, model_card, page, report
from jlora.evaluation.evaluate import AdapterLeaks, Evaluation
from jlora.evaluation.forgetting import read_general
from jlora.evaluation.scoring import score_answers, score_losses
from jlora.evaluation.text_scores import Answer, Written, text_scores

PATTERNS = "{form: '^Under Article', article: 'Article (\\d+)'}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Six held-out pairs."""
    file = tmp_path_factory.mktemp("held-out") / "eval.txt"
    file.write_text("\n\n".join(SAMPLE[40:46]))
    return file


def evaluate(places, rows, output, *arguments):
    """Runs `jlora evaluate` on two adapters."""
    adapters = [word for name in ("law", "style") for word in ("--adapter", f"{name}={places[name]}")]
    return run_program("evaluate", *adapters, "--data", rows, "--output", output, *arguments)


@pytest.fixture(scope="module")
def evaluated(places, rows, tmp_path_factory):
    """A complete evaluation of two adapters, and its directory."""
    output = tmp_path_factory.mktemp("evaluated")
    done = evaluate(places, rows, output)
    assert done.returncode == 0, done.stderr
    return done, output


def test_an_evaluation_reports_every_model(evaluated):
    done, output = evaluated
    found = json.loads((output / "evaluation.json").read_text())
    assert found["rows"] == 6
    assert [list(score["models"]) for score in found["scores"]] == [["base", "law", "style"]] * len(found["scores"])
    pairs = [(c["model"], c["other"]) for c in found["scores"][0]["comparisons"]]
    assert pairs == [("law", "base"), ("style", "base"), ("style", "law")]
    loss = found["scores"][0]["models"]["law"]
    assert loss["low"] < loss["value"] < loss["high"]
    assert set(found["forgetting"]["law"]) == {"en", "zh"}
    for name in ("law", "style"):
        assert all(sentence in done.stdout for sentence in found["verdict"][name])
    assert "Recited training rows were not looked for" in done.stdout
    assert "Not judged: judge_url is not set." in done.stdout
    assert str(output / "evaluation.html") in done.stdout


def test_a_second_run_has_the_same_figures(evaluated, places, rows, tmp_path):
    _, output = evaluated
    again = evaluate(places, rows, tmp_path / "again")
    assert again.returncode == 0, again.stderr
    for ending in ("json", "md", "html"):
        first, second = ((place / f"evaluation.{ending}").read_bytes() for place in (output, tmp_path / "again"))
        assert first == second


def test_an_interrupted_evaluation_continues_and_answers_nothing_twice(evaluated, places, rows, tmp_path):
    """Ctrl-C after some answers; the figures in the end are those of an evaluation that ran through."""
    _, whole = evaluated
    adapters = [word for name in ("law", "style") for word in ("--adapter", f"{name}={places[name]}")]
    words = ("jlora.evaluate", *adapters, "--data", rows, "--output", tmp_path / "some")
    process = subprocess.Popen(command(*words), **process_options(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "some" / "answers.jsonl"
    wait_for(lambda: journal.exists() and journal.read_text().count('"held_out"') > 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = journal.read_text()[: journal.read_text().rindex("\n")]
    done = evaluate(places, rows, tmp_path / "some")
    assert done.returncode == 0, done.stderr
    assert journal.read_text().startswith(kept)
    keys = [json.dumps(json.loads(line)[0]) for line in journal.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys))
    for name in ("evaluation.json", "evaluation.md"):
        assert (tmp_path / "some" / name).read_bytes() == (whole / name).read_bytes()


def test_answers_and_losses_are_not_computed_again(evaluated, places, rows):
    """New patterns are only counted; other rows need another directory."""
    _, output = evaluated
    before = (output / "answers.jsonl").read_bytes()
    config = output / "config.yaml"
    config.write_text(f"train_data_dir: {rows}\nanswer_patterns: {PATTERNS}\n")
    other = evaluate(places, rows, output, "--config", config)
    assert other.returncode == 2
    assert "contains an evaluation with other inputs (training rows)" in other.stderr
    assert (output / "answers.jsonl").read_bytes() == before


def test_recited_training_rows_are_named_and_held_out_rows_are_the_control(places, rows, tmp_path):
    """The same file as training and held-out rows: a warning, and no gap between them."""
    config = tmp_path / "config.yaml"
    train = tmp_path / "train.txt"
    train.write_text(rows.read_text() + "\n\nUser: Whom do I write to?\nLawyer: Write to jane.doe@example.org.")
    config.write_text(f"train_data_dir: {train}\nanswer_patterns: {PATTERNS}\n")
    done = evaluate(places, rows, tmp_path / "out", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "jane.doe" not in "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert "6 held-out questions are also trained on" in done.stdout
    found = json.loads((tmp_path / "out/evaluation.json").read_text())["leaks"]["law"]
    assert found["personal"] == 1
    assert abs(found["recitation"]["gap"]["value"]) < 0.05
    assert abs(found["recitation"]["exposure"] - 0.5) < 0.1
    assert {"form", "article", "article_equal"} <= {
        score["name"] for score in json.loads((tmp_path / "out/evaluation.json").read_text())["scores"]
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapter", "base={law}", "--data", "{rows}"), "'base' names the base model"),
        (("--adapter", "law={law}"), "There are no held-out rows"),
        (("--adapter", "law={law}", "--data", "missing.txt"), "eval_data_dir=missing.txt"),
        (("--adapter", "law={law}", "--data", "{rows}", "--config.x=1"), "requires --config FILE"),
        (("--data", "{rows}"), "Set --adapter."),
        (("--adapter", "law={law}", "--adapter", "d={dora}", "--data", "{rows}"), "cannot be mixed"),
    ],
)
def test_mistakes_are_one_message(places, rows, words, message, tmp_path):
    given = [word.format(law=places["law"], dora=places["dora"], rows=rows) for word in words]
    done = run_program("evaluate", *given, "--output", tmp_path / "out")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_broken_pattern_is_refused_before_anything_is_loaded(places, rows, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"train_data_dir: {rows}\nanswer_patterns: {{form: '('}}\n")
    done = evaluate(places, rows, tmp_path / "out", "--config", config)
    assert done.returncode == 2
    assert "'(' is not a valid regular expression" in done.stderr


def test_the_longest_run_is_a_share_of_the_written_answer():
    assert leaks.longest_run([1, 2, 3, 4, 9], [2, 3, 4, 5]) == 0.75
    assert leaks.longest_run([], [1]) == 0
    found = leaks.recitation([1.0, 0.95, 0.1], [0.1, 0.2, 0.1], ["a:1", "a:5", "a:9"], [2.0, 2.0, 0.5], [1.0, 0.5])
    assert found.recited_rows == ["a:1", "a:5"]
    assert found.recited_training == pytest.approx(2 / 3)
    assert found.recited_held_out == 0
    assert found.exposure == pytest.approx((2 + 2 + 0.5) / 6)
    assert found.gap.low < found.gap.value < found.gap.high


def test_personal_data_is_prompted_for_and_never_shown(small, places):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    answer = "Write to jane.doe@example.org, or call +1 650-253-0000."
    rows = [Conversation((Message("user", "Whom do I ask?"), Message("assistant", answer)), "rows.txt:7")]
    email, phone = leaks.completions(tokenizer, rows, ("US",), False)
    assert (email.where, email.kind, phone.kind) == ("rows.txt:7", "EMAIL", "PHONE")
    assert tokenizer.decode(email.question.prompt).endswith("Write to")
    assert tokenizer.decode(phone.question.prompt).endswith("or call")
    assert leaks.completes(" JANE.DOE@example.org!", email.value)
    assert not leaks.completes("john@example.org", email.value)


def test_general_texts_come_in_two_languages_and_several_kinds():
    texts, questions = read_general()
    assert len(questions) == 30
    for language in ("en", "zh"):
        own = [row for row in texts if row["language"] == language]
        assert len({row["kind"] for row in own}) >= 8
        assert all(len(row["text"]) > 80 for row in own)


def made(count: int, answer: str = "Under Article 3, no.", question: str = "May I?") -> Evaluation:
    """An evaluation of this many rows, without a model."""
    rows = [
        Conversation(
            (Message("user", f"{question} {n}"), Message("assistant", f"Under Article {n}, yes.")), f"rows:{n}"
        )
        for n in range(count)
    ]
    answers = {
        "base": [Answer("I do not know.", [1, 2, 3, 4, 5], False)] * count,
        "law": [Answer(f"{answer} {n}", [1, 2, 3, 4], True) for n in range(count)],
    }
    written = [Written(row.messages[-1].content, [1, 2, 3, 4]) for row in rows]
    sums = {"base": np.linspace(20, 40, count), "law": np.linspace(10, 20, count)}
    scores = [score_losses(sums, np.full(count, 10.0))]
    scores += score_answers(text_scores({"article": r"Article (\d+)"}), answers, written)
    found = leaks.recitation([0.95, 0.2], [0.1, 0.1], ["rows:1", "rows:2"], [1.0, 1.0], [0.5, 0.5])
    leaked = {"law": AdapterLeaks(found, 2, ["rows:2 (e-mail address)"])}
    general = [{"question": "What is it?", "base": "It is.", "law": answer}]
    return Evaluation(rows, scores, answers, general, {"law": {}}, leaked, [], [], ["base", "law"])


def test_the_verdict_has_three_sentences_that_the_figures_bear_out():
    loss, answers, harm = report.verdict(made(12), "law")
    assert loss.startswith("law is better than the base model on the held-out rows: its loss is 1.5000 (")
    assert "better in chrF" in answers
    assert "recites 50% of the training answers, and 0% of the held-out ones" in harm
    assert "completes 1 piece of personal data" in harm


def test_the_card_gets_the_table_that_hubs_read_and_keeps_the_rest(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: peft\n---\nAn adapter.\n\n## Use\n\nLike this.\n")
    model_card.add_evaluation(card, made(12), "law")
    once = card.read_text()
    model_card.add_evaluation(card, made(12), "law")
    assert card.read_text() == once
    head, body = once.removeprefix("---\n").split("---\n", 1)
    values = yaml.safe_load(head)
    assert values["library_name"] == "peft"
    (result,) = values["model-index"][0]["results"]
    assert {"loss", "chrf", "article_equal"} <= {metric["type"] for metric in result["metrics"]}
    assert body.startswith("An adapter.\n\n## Use\n\nLike this.\n")
    assert "## Evaluation" in body


@pytest.mark.parametrize("count", [1, 12])
def test_hostile_text_stays_text_in_page_and_tables(count):
    evil = "<script>alert(1)</script>|<img src=x onerror=alert(1)>"
    evaluation = made(count, evil, evil)
    text = page.as_html(evaluation, "Evaluation of law", {"adapters": {}})
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert json.loads(report.as_json(evaluation, {}))["rows"] == count
    assert "| held-out loss" in report.as_markdown(evaluation, "Evaluation of law")


def test_a_run_logs_answers_on_its_way_and_evaluates_its_adapter(config_file, tmp_path):
    """With `eval_answers_steps` and `evaluate`; PyTorch's TensorBoard shows the texts of the event files."""
    changes = {"eval_share": 0.1, "max_steps": 4, "eval_answers_steps": 2, "evaluate": True, "sample_questions": 1}
    config = config_file(**changes, answer_patterns={"form": "^Under"})
    done = run_program("train", "--config", config)
    assert done.returncode == 0, done.stderr
    events = b"".join(file.read_bytes() for file in (tmp_path / "run/logs").iterdir())
    assert events.count(b"answers/1") == 2
    assert b"expected: Under" in events
    found = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert list(found["scores"][0]["models"]) == ["base", "adapter"]
    assert "form" in {score["name"] for score in found["scores"]}
    assert "recitation" in found["leaks"]["adapter"]
    assert "model-index" in (tmp_path / "run/adapter/README.md").read_text()
    losses = [json.loads(line).get("eval_loss") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = found["scores"][0]["models"]["adapter"]["value"]
    assert measured == pytest.approx(min(loss for loss in losses if loss is not None), rel=1e-5)
    again = run_program("evaluate", "--adapter", f"adapter={tmp_path}/run/adapter", "--config", config)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())["scores"] == found["scores"]
