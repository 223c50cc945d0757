"""The judge: a model behind OpenAI's API that answers slowly, wrongly, with errors, or dies halfway."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jlora.data.conversation import Conversation, Message
from jlora.evaluation import judge as judge_module
from jlora.evaluation.journal import Journal
from jlora.evaluation.judge import KEY, UNCLEAR, Judge
from jlora.evaluation.text_scores import Answer

ROWS = [
    Conversation((Message("user", f"Question {n}?"), Message("assistant", f"Written {n}.")), f"rows:{n}")
    for n in range(12)
]
ANSWERS = {
    "base": [Answer(f"base {n}", [], True) for n in range(12)],
    "law": [Answer(f"law {n}", [], True) for n in range(12)],
}


class Fake(ThreadingHTTPServer):
    """A judge on loopback.

    Args:
      reply: maps the prompt, and how often it was asked before, to a reply, a status, or None, which hangs up.
    """

    daemon_threads = True

    def __init__(self, reply) -> None:
        self.reply, self.asked, self.keys, self.lock = reply, Counter(), set(), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers with what the server's `reply` says."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            before = self.server.asked[prompt]
            self.server.asked[prompt] += 1
            self.server.keys.add(self.headers["Authorization"])
        reply = self.server.reply(prompt, before)
        if reply is None:
            self.close_connection = True
            return
        status, content = (200, reply) if isinstance(reply, str) else (reply, "no")
        message = {"role": "assistant", "content": content}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *arguments) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def running(reply):
    """Runs a judge."""
    server = Fake(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def journal(tmp_path):
    """An empty journal."""
    with contextlib.closing(Journal(tmp_path / "answers.jsonl", {})) as opened:
        yield opened


def law_first(prompt: str) -> bool:
    """Whether the adapter's answer is the first one."""
    return prompt.index("law ") < prompt.index("base ")


def prefers_law(prompt: str, before: int) -> str:
    """Prefers the adapter, wherever its answer is."""
    return "Answer 1 is better." if law_first(prompt) else "2"


def test_the_better_answer_wins_in_both_orders(journal):
    with running(prefers_law) as server:
        judge = Judge(server.url, "m")
        assert judge.judge_all(ROWS, ANSWERS, journal) == ""
        assert judge.judge_all(ROWS, ANSWERS, journal) == ""
        assert sum(server.asked.values()) == 24, "something was judged twice"
    (found,) = judge.preferences(len(ROWS), list(ANSWERS), journal)
    assert (found.model, found.other, found.rows, found.won, found.lost) == ("law", "base", 12, 12, 0)
    assert found.verdict == "better"


def test_a_judge_that_prefers_the_first_answer_shows_no_difference(journal):
    with running(lambda prompt, before: "1") as server:
        judge = Judge(server.url, "m")
        judge.judge_all(ROWS, ANSWERS, journal)
    (found,) = judge.preferences(len(ROWS), list(ANSWERS), journal)
    assert (found.won, found.lost, found.verdict) == (0, 0, "no difference shown")


def test_errors_and_hung_up_connections_are_retried(journal, monkeypatch):
    """429 and 500 first, then a connection without a reply, then the verdict."""
    monkeypatch.setattr("openai._constants.MAX_RETRY_DELAY", 0.1)
    failures = [429, 500, None]
    with running(lambda prompt, before: failures[before] if before < 3 else prefers_law(prompt, before)) as server:
        judge = Judge(server.url, "m")
        assert judge.judge_all(ROWS[:3], ANSWERS, journal) == ""
        assert set(server.asked.values()) == {4}
    assert judge.preferences(3, list(ANSWERS), journal)[0].won == 3


def test_replies_without_a_verdict_are_asked_for_again_and_then_counted(journal):
    with running(lambda prompt, before: "I cannot say." if law_first(prompt) or before < 2 else "2") as server:
        judge = Judge(server.url, "m")
        judge.judge_all(ROWS[:2], ANSWERS, journal)
        assert set(server.asked.values()) == {judge_module.ATTEMPTS}
    (found,) = judge.preferences(2, list(ANSWERS), journal)
    assert (found.unclear, found.won, found.lost) == (2, 0, 0)
    assert journal["judge", judge.url, "m", "law", "base", 0] == UNCLEAR


def test_a_judge_that_dies_halfway_is_continued(journal, monkeypatch):
    monkeypatch.setattr(judge_module, "RETRIES", 1)
    gone = threading.Event()

    def dies(prompt: str, before: int) -> str | int:
        if len(server.asked) > 10:
            gone.set()
        return 503 if gone.is_set() else prefers_law(prompt, before)

    with running(dies) as server:
        judge = Judge(server.url, "m")
        remark = judge.judge_all(ROWS, ANSWERS, journal)
        assert f"The judge at {server.url} stopped after" in remark
        assert "of 24 comparisons" in remark
        kept = judge.preferences(len(ROWS), list(ANSWERS), journal)[0].rows
        assert 0 < kept < 12
        asked = {prompt for prompt, count in server.asked.items() if count == 1}
        server.reply = prefers_law
        server.asked.clear()
        assert judge.judge_all(ROWS, ANSWERS, journal) == ""
        assert not asked & server.asked.keys(), "something was judged twice"
    assert judge.preferences(len(ROWS), list(ANSWERS), journal)[0].won == 12


def test_a_slow_judge_is_asked_several_things_at_a_time(journal):
    """Four at a time: the slowest takes as long as the others beside it."""
    together, most, lock = [0], [0], threading.Lock()

    def slow(prompt: str, before: int) -> str:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.1)
        with lock:
            together[0] -= 1
        return prefers_law(prompt, before)

    with running(slow) as server:
        assert Judge(server.url, "m").judge_all(ROWS, ANSWERS, journal) == ""
    assert most[0] == judge_module.AT_A_TIME


def test_the_key_is_sent_and_kept_nowhere(journal, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv(KEY, "sk-secret-1")
    with running(prefers_law) as server:
        Judge(server.url, "m").judge_all(ROWS[:2], ANSWERS, journal)
        assert server.keys == {"Bearer sk-secret-1"}
    assert "sk-secret" not in (tmp_path / "answers.jsonl").read_text() + "".join(capfd.readouterr())
