"""Scores of answers and texts: they agree with the libraries that define them, and intervals and tests hold."""

import json

import numpy as np
import peft
import pytest
import sacrebleu
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer

from jlora import UserError, load_model
from jlora.common.statistics import difference, gap, interval
from jlora.data.conversation import Conversation, Message
from jlora.data.loss_mask import encode_conversations
from jlora.evaluation.journal import Journal
from jlora.evaluation.likelihood import ROWS, Likelihood
from jlora.evaluation.scoring import score_answers
from jlora.evaluation.subjects import BASE, subjects_of
from jlora.evaluation.text_scores import Answer, Written, text_scores

ENGLISH = [
    ("Under Article 10, it must be in writing.", "Under Article 10, a written contract must be concluded."),
    ("No.", "Under Article 82, the employer pays double wages for each month."),
    ("It depends on the case; ask a lawyer!", "It depends on the case; ask a lawyer!"),
]
CHINESE = [("依据第10条，应当订立书面合同。", "依据《劳动合同法》第10条，应当订立书面劳动合同。")]


def measured(name, pairs, patterns=None):
    """The value and the weight of a score for each pair."""
    (score,) = [score for score in text_scores(patterns or {}) if score.name == name]
    return [score.measure(Answer(text, text.split(), True), Written(own, own.split())) for text, own in pairs]


def test_scores_equal_direct_calls_of_their_libraries():
    for pairs, tokenize in ((ENGLISH, "13a"), (CHINESE, "zh")):
        chrf = [sacrebleu.sentence_chrf(text, [own]).score for text, own in pairs]
        bleu = [sacrebleu.sentence_bleu(text, [own], tokenize=tokenize).score for text, own in pairs]
        assert measured("chrf", pairs) == [(value, 1.0) for value in chrf]
        assert measured("bleu", pairs) == [(value, 1.0) for value in bleu]
    scorer = RougeScorer(["rougeL"])
    rouge = [100 * scorer.score(own, text)["rougeL"].fmeasure for text, own in ENGLISH]
    assert measured("rouge_l", ENGLISH) == [(value, 1.0) for value in rouge]


def test_rouge_counts_the_characters_of_chinese_text():
    """rouge_score's own tokenizer finds only the number in this text, and calls the answers equal."""
    text, own = CHINESE[0]
    assert RougeScorer(["rougeL"]).score(own, text)["rougeL"].fmeasure == 1
    # The answer has 13 characters, "10" being one, which are all among the 20 of the written one, in this order.
    assert measured("rouge_l", CHINESE)[0][0] == pytest.approx(200 * 13 / (13 + 20))


def test_patterns_compare_their_groups_with_the_written_answer():
    patterns = {"form": "^Under Article", "article": r"Article (\d+)"}
    assert [value for value, _ in measured("form", ENGLISH, patterns)] == [1, 0, 0]
    assert measured("article_equal", ENGLISH, patterns) == [(1, 1), (0, 1), (1, 0)]  # the last has no article
    with pytest.raises(UserError, match="not a valid regular expression"):
        text_scores({"form": "("})


def test_length_end_and_repetition():
    answer, written = Answer("a b", [1, 2, 1, 2, 1, 2, 1, 2], False), Written("a", [1] * 4)
    found = {score.name: score.measure(answer, written) for score in text_scores({})}
    assert found["length_ratio"] == (2.0, 1.0)
    assert found["ended"] == (0.0, 1.0)
    assert found["distinct"] == (2 / 5, 1.0)


def test_intervals_contain_the_mean_about_as_often_as_they_say():
    random = np.random.RandomState(0)
    samples = [random.exponential(size=60) for _ in range(100)]
    found = [interval(sample, np.ones(60)) for sample in samples]
    assert 85 <= sum(own.low <= 1 <= own.high for own in found) <= 100
    assert interval(np.array([2.0, 9.0]), np.array([1.0, 0.0])) == (2.0, 2.0, 2.0)  # a row without weight is left out


def test_a_difference_is_shown_only_if_chance_does_not_explain_it():
    random = np.random.RandomState(1)
    base = random.randn(40)
    weights = np.full(40, 2.0)
    assert difference(base + 1 + 0.1 * random.randn(40), base, weights).shown
    assert difference(base, base, weights).p == 1
    chance = [difference(random.randn(40), random.randn(40), weights).shown for _ in range(100)]
    assert sum(chance) <= 12  # 5 are expected
    same = difference(base, base[::-1], weights)
    assert same == difference(base, base[::-1], weights)  # the same figures each time
    assert gap(np.ones(5), np.zeros(5)).low == 1


def test_comparisons_use_the_rows_of_both_models():
    scores = [score for score in text_scores({"article": r"Article (\d+)"}) if score.name == "article_equal"]
    written = [Written(own, []) for _, own in ENGLISH]
    answers = {
        BASE: [Answer("No.", [], True)] * 3,
        "law": [Answer(text, [], True) for text in ("Article 10", "Article 82", "Article 1")],
    }
    (found,) = score_answers(scores, answers, written)
    assert (found.means["law"].value, found.means[BASE].value) == (1.0, 0.0)
    assert found.verdict("law", BASE) == "no difference shown"  # of two rows
    assert np.isnan(found.rows["law"][2])


@pytest.fixture(scope="module")
def conversations():
    """Pairs of different lengths, and plain text."""
    text = [Conversation((Message("text", "A short text. " * n),), f"t{n}") for n in (1, 9)]
    turns = [
        Conversation((Message("user", f"Question {n}?"), Message("assistant", "An answer. " * n)), f"q{n}")
        for n in range(1, ROWS + 2)
    ]
    return [*text, *turns]


def test_losses_and_divergence_equal_transformers_and_peft(tiny, tmp_path, conversations):
    """Perplexity to 1e-4, relative; KL over the whole vocabulary; with a batch that is not full."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    form = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, form)
    adapted.save_pretrained(tmp_path / "law")
    subjects = subjects_of(load_model(str(tiny), {"law": tmp_path / "law"}).generator)
    generator = subjects.generator
    examples = encode_conversations(generator.tokenizer, generator.ends, conversations, "assistant")
    for example, found in zip(examples, Likelihood(subjects).measure(examples), strict=True):
        at = np.flatnonzero(example.weights[1:])
        ids = torch.tensor(example.tokens[None].astype(int))
        with torch.no_grad():
            logs = {"law": adapted(ids).logits[0].log_softmax(-1)}
            with adapted.disable_adapter():
                logs[BASE] = adapted(ids).logits[0].log_softmax(-1)
        for name, own in logs.items():
            chosen = own[at, example.tokens[at + 1].astype(int)].numpy()
            assert np.exp(-found[name].log_probs.mean()) == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
            np.testing.assert_allclose(found[name].log_probs, chosen, atol=1e-4)
            assert found[name].greedy.tolist() == (own.argmax(-1)[at].numpy() == example.tokens[at + 1]).tolist()
        divergence = (logs[BASE].exp() * (logs[BASE] - logs["law"])).sum(-1)[at].numpy()
        np.testing.assert_allclose(found["law"].divergence, divergence, atol=1e-4)
        assert found["law"].divergence.max() > 0.01
        assert np.abs(found[BASE].divergence).max() < 1e-5


def test_an_adapter_in_its_own_form_is_measured_too(small, places):
    """DoRA has no place beside others: it and the base model run one after the other."""
    subjects = subjects_of(load_model(str(small), {"dora": places["dora"]}).generator)
    alone = subjects_of(load_model(str(small)).generator)
    rows = [Conversation((Message("text", "A short text."),), "t")]
    (example,) = encode_conversations(subjects.generator.tokenizer, subjects.generator.ends, rows, "assistant")
    (found,), (base,) = (list(Likelihood(own).measure([example])) for own in (subjects, alone))
    np.testing.assert_allclose(found[BASE].log_probs, base[BASE].log_probs, atol=1e-5)
    assert np.abs(found["dora"].log_probs - found[BASE].log_probs).max() > 1e-3


def test_a_journal_continues_after_half_a_line_and_refuses_other_inputs(tmp_path):
    file = tmp_path / "answers.jsonl"
    journal = Journal(file, {"rows": "a"})
    journal.add(("answer", 1, "law"), {"text": "§ 1"})
    journal.close()
    with file.open("a") as opened:
        opened.write('[["answer", 2, "la')
    again = Journal(file, {"rows": "a"})
    assert again["answer", 1, "law"] == {"text": "§ 1"}
    assert ("answer", 2, "law") not in again
    again.add(("answer", 2, "law"), [1])
    again.close()
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == [
        [["answer", 1, "law"], {"text": "§ 1"}],
        [["answer", 2, "law"], [1]],
    ]
    with pytest.raises(UserError, match=r"other inputs \(rows\)"):
        Journal(file, {"rows": "b"})
