"""The code itself: small files, lazy imports, nothing hidden. Format, lint, types and layers: .ci/run checks them."""

import ast
import re
import subprocess
import sys

from conftest import ROOT


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
