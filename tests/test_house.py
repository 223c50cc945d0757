"""The code itself: small files, lazy imports, nothing hidden. Format, lint, types and layers: .ci/run checks them."""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from programs import short_run


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


def test_files_and_functions_are_small():
    for file in [*modules().values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        text = file.read_text()
        assert len(text.splitlines()) <= 350, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"


def test_files_have_docstrings_and_avoid_risky_calls():
    for name, file in modules().items():
        text = file.read_text()
        assert not re.search(r"import pickle|torch\.load|trust_remote_code|jax\._src|jax\.interpreters", text), name
        assert re.match(r'"""', text), f"{name} does not say what it is"


def test_heavy_imports_are_lazy():
    """PyTorch alone would be half of the time that `python -m jlora.train` takes to start."""
    code = "import jlora.cli.train, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "jax" in imported and not {"torch", "transformers", "pandas", "tensorflow"} & imported


def test_every_required_package_is_used():
    used = {name.split(".")[0] for file in modules().values() for name in imports(file)}
    fixed = "jax flax optax orbax transformers safetensors ml_collections tensorflow_datasets".split()
    assert set(fixed) <= used


EVERY_MODULE_AND_A_RUN = """
import importlib, json, pkgutil, sys
import jlora
for module in pkgutil.walk_packages(jlora.__path__, "jlora."):
    if not module.name.endswith("__main__") and module.name not in sys.argv[2:]:
        importlib.import_module(module.name)
result = jlora.finetune(jlora.Config(**json.loads(sys.argv[1])))
print(jlora.load_model(adapters={"it": result.adapter}).answer("What is this?", adapter="it", max_new_tokens=2))
"""
DEPRECATED = re.compile(r"^\S*/jlora/\S+\.py:\d+: (?:Pending)?DeprecationWarning: .*", re.MULTILINE)


def warnings_of(*command):
    """Returns what a program prints to standard error, with all warnings about deprecated functions."""
    options = ["-W", "always::DeprecationWarning", "-W", "always::PendingDeprecationWarning"]
    return subprocess.run([sys.executable, *options, *map(str, command)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_nothing_deprecated_is_used(tiny, pairs, tmp_path):
    """By jlora itself, with the versions that are installed; and nothing private of JAX."""
    control = tmp_path / "jlora/old.py"
    control.parent.mkdir()
    control.write_text("import warnings\nwarnings.warn('this is old', DeprecationWarning)\n")
    assert DEPRECATED.findall(warnings_of(control).stderr)
    settings = json.dumps({**short_run(tiny, pairs, tmp_path / "run", batch_size=8, max_steps=2), "num_processes": 1})
    programs = [
        f"jlora.{name}" for name in ("train", "plan", "generate", "combine", "evaluate")
    ]  # importing one runs it
    if not importlib.util.find_spec("lm_eval"):
        programs.append("jlora.evaluation.harness")
    done = warnings_of("-c", EVERY_MODULE_AND_A_RUN, settings, *programs)
    assert done.returncode == 0, done.stderr
    assert not DEPRECATED.findall(done.stderr)
    for file in sorted((ROOT / "jlora").rglob("*.py")):
        assert not re.search(r"jax\._src|jaxlib\._|from jax import _", file.read_text()), file
