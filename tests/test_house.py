"""The house as DESIGN says: who may import whom, format, lint, types, and nothing that hides."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# A module may import only from rooms that stand before its own.
ROOMS = [
    ["jlora", "jlora.errors", "jlora.whole", "jlora.hlo", "jlora.heap"],
    ["jlora.targets", "jlora.hosts"],
    ["jlora.output_rules", "jlora.data.conversation", "jlora.data.templates", "jlora.sites"],
    ["jlora.data.encoding"],
    ["jlora.data.records", "jlora.data.text", "jlora.data.stored"],
    ["jlora.data.json_rows", "jlora.data.tables"],
    [
        "jlora.lora",
        "jlora.loss_scale",
        "jlora.sharding",
        "jlora.model.compute",
        "jlora.model.quant",
        "jlora.model.rope",
        "jlora.model.weights",
    ],
    ["jlora.model.flash", "jlora.model.slots"],
    ["jlora.model.attention"],
    ["jlora.data.formats", "jlora.model.llama", "jlora.several", "jlora.gguf_tokenizer"],
    ["jlora.data.chat", "jlora.data.pii", "jlora.model.hf", "jlora.model.families", "jlora.model.backend"],
    ["jlora.from_gguf"],
    ["jlora.sources"],
    ["jlora.config", "jlora.compiling", "jlora.known"],
    ["jlora.config_files", "jlora.adapter_config", "jlora.provenance"],
    ["jlora.optim", "jlora.data.batches", "jlora.data.inspect", "jlora.data.prepared"],
    ["jlora.data.overlong", "jlora.data.report", "jlora.data.xray"],
    ["jlora.intake", "jlora.loss"],
    ["jlora.step"],
    [
        "jlora.checkpoint",
        "jlora.programs",
        "jlora.peft_format",
        "jlora.loaders",
        "jlora.to_gguf",
        "jlora.merged",
        "jlora.card",
    ],
    ["jlora.metrics", "jlora.resume", "jlora.generator", "jlora.combine", "jlora.check"],
    ["jlora.verify", "jlora.loop", "jlora.chat_program"],
    ["jlora.export", "jlora.generate"],
    ["jlora.forecast"],
    ["jlora.search", "jlora.ready"],
    ["jlora.train", "jlora.data.__main__"],
    ["jlora.plan"],
]
APART = {  # rooms that know nothing of each other
    "jlora.data": {"jlora.model", "jlora.lora", "jlora.sharding", "jlora.config", "jlora.checkpoint"},
    "jlora.model": {"jlora.data", "jlora.config", "jlora.checkpoint"},
    "jlora.lora": {"jlora.model", "jlora.data", "jlora.config"},
}


def modules():
    files = sorted((ROOT / "jlora").rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules() else node.module
                for alias in node.names
            )


def test_every_import_points_to_a_room_before():
    rank = {name: i for i, room in enumerate(ROOMS) for name in room}
    files = {name: file for name, file in modules().items() if name not in ("jlora.data", "jlora.model")}
    assert set(rank) == set(files)
    for name, file in files.items():
        for other in imports(file):
            if other.split(".")[0] != "jlora":
                continue
            assert rank[other] < rank[name], f"{name} imports {other}"
            for room, strangers in APART.items():
                if name.startswith(room) and not name.endswith("__main__"):  # a program may join rooms
                    assert not any(other.startswith(s) for s in strangers), f"{name} imports {other}"


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_checks(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_small_and_hide_nothing():
    for name, file in modules().items():
        text = file.read_text()
        assert len(text.splitlines()) <= 350, name
        assert not re.search(r"import pickle|torch\.load|trust_remote_code|jax\._src|jax\.interpreters", text), name
        assert re.match(r'"""', text), f"{name} does not say what it is"


def test_what_is_slow_to_import_is_imported_where_it_is_needed():
    """PyTorch alone would be half of the time that `python -m jlora.train` takes to start."""
    code = "import jlora.train, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "jax" in imported and not {"torch", "transformers", "pandas", "tensorflow"} & imported


def test_packages_that_the_user_fixed_are_used():
    used = {name.split(".")[0] for file in modules().values() for name in imports(file)}
    fixed = "jax flax optax orbax transformers safetensors ml_collections tensorflow_datasets".split()
    assert set(fixed) <= used
