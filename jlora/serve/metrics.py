"""What an operator watches, in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jlora.serve.engine import Engine, Request

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server.

    Args:
      engine: its queue, places and blocks are read when the metrics are.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("jlora_requests", "Requests by model and end", ["model", "end"], registry=registry)
        self._prompt = Counter("jlora_prompt_tokens", "Tokens of prompts", registry=registry)
        self._reused = Counter("jlora_reused_tokens", "Tokens of prompts that were in the cache", registry=registry)
        self._answer = Counter("jlora_answer_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "jlora_first_token_seconds", "Time to the first token", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram(
            "jlora_answer_seconds", "Time to the end of an answer", buckets=SECONDS, registry=registry
        )
        for name, text, value in (
            ("jlora_waiting", "Requests that wait", lambda: len(engine.waiting)),
            ("jlora_running", "Requests that run", lambda: len(engine.requests()) - len(engine.waiting)),
            ("jlora_free_cache_tokens", "Tokens that the cache has room for", lambda: engine.free_tokens),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def count(self, model: str, end: str, request: Request) -> None:
        """Counts a request that has ended.

        Args:
          model: "base", an adapter's name, or "sum".
          end: "stop", "length" or "cancelled".
        """
        self._requests.labels(model, end).inc()
        self._prompt.inc(len(request.prompt))
        self._reused.inc(request.reused)
        self._answer.inc(len(request.answer))
