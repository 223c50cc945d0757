"""EleutherAI's lm-evaluation-harness over jlora's engine: public benchmarks for the base model and each adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from jlora.common.errors import UserError
from jlora.data.examples import Example
from jlora.evaluation.likelihood import Likelihood
from jlora.evaluation.subjects import Subjects
from jlora.serve.engine import Request

MAX_NEW_TOKENS = 256  # unless the task says how many


class HarnessModel(TemplateLM):
    """The harness' interface to one of the subjects.

    Args:
      subjects: the models; likelihoods are computed for all of them together.
      name: which of them this is.
      known: likelihoods that were computed before, shared by all models.
    """

    def __init__(self, subjects: Subjects, name: str, known: dict[Any, dict[str, tuple[float, bool]]]) -> None:
        super().__init__()
        self._subjects, self._name, self._known = subjects, name, known
        self._likelihood, self.tokenizer = Likelihood(subjects), subjects.generator.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id of the token before a text without a context."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else int(own)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness' caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self._subjects.generator.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, in nats, and whether it is the greedy one."""
        limit = self.max_length + 1
        inputs = [((*context, *continuation)[-limit:], len(continuation)) for _, context, continuation in requests]
        missing = sorted({own for own in inputs if own not in self._known}, key=lambda own: len(own[0]))
        examples = []
        for tokens, count in missing:
            weights = np.zeros(len(tokens), np.float32)
            weights[-count:] = 1.0
            examples.append(Example(np.array(tokens, np.int32), weights, ""))
        for own, found in zip(missing, self._likelihood.measure(examples), strict=True):
            self._known[own] = {
                name: (float(one.log_probs.sum()), bool(one.greedy.all())) for name, one in found.items()
            }
        return [self._known[own][self._name] for own in inputs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, in windows of the model's context."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [("", *utils.make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns a greedy answer to each request, up to its first stop string."""
        generator, mixture = self._subjects.generator, self._subjects.mixtures[self._name]
        made, stops = [], []
        for text, options in (request.args for request in requests):
            if options.get("do_sample") and options.get("temperature", 0) > 0:
                raise UserError("--tasks: This task samples its answers. jlora evaluates greedy answers only.")
            until = options.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            size = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
            prompt = self.tok_encode(text)[-max(self.max_length - size, 1) :]
            made.append(Request(prompt, mixture, size))
        longest = max((len(request.prompt) + request.max_new_tokens for request in made), default=1)
        for _ in generator.generate_each(made, longest, len(made)):
            pass
        texts = (self.tokenizer.decode([token.id for token in one.answer], skip_special_tokens=True) for one in made)
        return [_until(text, own) for text, own in zip(texts, stops, strict=True)]


def _until(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first of some strings."""
    return text[: min((at for at in (text.find(stop) for stop in stops if stop) if at >= 0), default=len(text))]


def run_tasks(
    subjects: Subjects, tasks: Sequence[str], include: Path | None, limit: int | None, *, chat: bool
) -> dict[str, dict[str, Any]]:
    """Runs tasks of the harness, and returns the results of each model by name.

    Args:
      tasks: names of tasks, or YAML files of tasks.
      include: a directory with more tasks.
      limit: questions of each task, at most; None: all.
      chat: whether questions go through the chat template.

    Raises:
      UserError: a task is unknown, or its data cannot be read.
    """
    manager = TaskManager(include_path=str(include) if include else None)
    known: dict[Any, dict[str, tuple[float, bool]]] = {}
    found = {}
    for name in subjects.mixtures:
        try:
            results = simple_evaluate(
                HarnessModel(subjects, name, known),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=1000,
            )
        except (ValueError, KeyError, FileNotFoundError, ConnectionError) as error:
            raise UserError(f"--tasks {','.join(tasks)}: {str(error).splitlines()[0]}") from None
        found[name] = {} if results is None else results["results"]
    return found
