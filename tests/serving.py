"""Starts `jlora serve` as a user would, and reads what it says about itself."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import httpx
import openai
import peft
import transformers
from programs import command, process_options, wait_for
from prometheus_client.parser import text_string_to_metric_families

# Name -> its projections, rank and alpha.
ADAPTERS = {
    "law": (["q_proj", "v_proj"], 4, 16),
    "style": (["v_proj", "down_proj"], 6, 12),
    "extra": (["gate_proj"], 2, 8),
    "more": (["o_proj", "k_proj"], 8, 24),
}


def make_adapters(base: Path, root: Path) -> dict[str, Path]:
    """Writes random adapters with PEFT; name -> directory."""
    for number, (name, (targets, rank, alpha)) in enumerate(ADAPTERS.items()):
        transformers.set_seed(number)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        form = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(model, form).save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


def model_options(base: Path, adapters: dict[str, Path]) -> list[str]:
    """Returns the options of all servers, so that they share their compiled programs: room for two more adapters."""
    named = [word for name in ("law", "style") for word in ("--adapter", f"{name}={adapters[name]}")]
    loading = ["--adapter_root", str(adapters["law"].parent), "--max_adapters", "4", "--max_rank", "8"]
    return ["--base", str(base), *named, *loading, "--places", "4"]


class Served:
    """A running server.

    Args:
      log: file with all that it has printed.
    """

    def __init__(self, process: subprocess.Popen, log: Path, key: str) -> None:
        self.process, self._log, self.key = process, log, key
        wait_for(lambda: process.poll() is not None or "Serving " in self.output, seconds=120)
        found = re.search(r"^Serving (.+) at (http://.+:(\d+))$", self.output, re.MULTILINE)
        assert found, self.output
        self.models, self.url, self.port = found[1].split(", "), found[2], int(found[3])
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text()

    def post(self, path: str, /, **body) -> httpx.Response:
        """Sends a request with a body in JSON."""
        return self.http.post(path, json=body)

    def chat(self, question: str, model: str = "base", **options) -> httpx.Response:
        """Asks one question, greedily unless told otherwise."""
        turns = [{"role": "user", "content": question}]
        return self.post("/v1/chat/completions", model=model, messages=turns, **{"temperature": 0, **options})

    def text(self, question: str, model: str = "base", **options) -> str:
        """Returns the answer to one question."""
        answer = self.chat(question, model, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def metrics(self) -> dict[str, float]:
        """Returns the sum of each metric over its labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def idle(self) -> bool:
        """Whether no request waits or runs."""
        now = self.metrics()
        return now["jlora_waiting"] == now["jlora_running"] == 0

    def memory(self) -> int:
        """Returns the bytes of memory that the process has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


@contextlib.contextmanager
def served(*arguments, key: str = "", program: tuple[str, ...] = (), **options):
    """Runs a server on a free port; at the end it must stop when it is told to, and must have had no bug.

    Args:
      key: API key in its environment.
      program: what to run instead of `python -m jlora.serve`.
    """
    setup = process_options(1)
    setup["env"] |= {"JLORA_API_KEY": key}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*(program or command("jlora.serve")), *map(str, arguments), "--port", "0"],
                **{**setup, **options},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            server = Served(process, log, key)
            yield server
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
                process.wait(60)
            assert "Traceback" not in server.output, server.output
        finally:
            process.kill()
            process.wait()
