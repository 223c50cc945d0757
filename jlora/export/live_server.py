"""Starts a server in float32 with one adapter, so that `live.py` can ask it."""

import contextlib
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from jlora.common.errors import UserError
from jlora.export.gguf_adapter import FILE

SPAWN = "spawn"
START_SECONDS = 900  # for a server to load and compile
NAME = "adapter"  # the adapter's name there
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "JLORA_API_KEY": ""}
LLAMA_CPP = """
import sys, threading, xllamacpp
params, lora = xllamacpp.CommonParams(), xllamacpp.CommonAdapterLoraInfo()
params.port, params.model.path, lora.path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
params.n_ctx, params.n_parallel, lora.scale, params.lora_adapters = 2048, 1, 1.0, [lora]
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
threading.Event().wait()
"""


@contextlib.contextmanager
def spawned(server: str, base: Path, adapter: Path, rank: int, gguf: Path | None) -> Iterator[str]:
    """Starts a server in float32 with a base model and an adapter; yields its address.

    Raises:
      UserError: it is not installed, or ends before it answers.
    """
    with tempfile.TemporaryFile("w+") as log, contextlib.ExitStack() as stack:
        command = functools.partial(_command, server, base, adapter, rank, gguf)
        yield stack.enter_context(running(command, log, ENVIRONMENT))[0]


@contextlib.contextmanager
def running(
    command: Callable[[int], list[str]], log: IO[str], environment: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Starts a server and yields its address, once it answers /health, and its process; ends it afterwards.

    Args:
      command: returns the server's command for a port.
      log: gets what it prints.
      environment: variables beside those of this process.

    Raises:
      UserError: it ends before it answers, or does not answer in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words, url = command(port), f"http://127.0.0.1:{port}"
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                last = " ".join(log.read()[-300:].split())
                raise UserError(f"--live {SPAWN}: {words[0]} did not start. Its last words: {last}")
            time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _command(server: str, base: Path, adapter: Path, rank: int, gguf: Path | None, port: int) -> list[str]:
    if server == "vllm" and (program := shutil.which("vllm")):
        # Not `vllm serve`, which fails with vLLM's wheel for CPUs, because its package has another name.
        python = str(Path(program).parent / "python")
        return [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)),
            *("--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "2048", "--enable-lora", "--max-lora-rank", str(rank)),
            *("--lora-modules", f"{NAME}={adapter}"),
        ]
    if server == "llama.cpp":
        if gguf is None:
            raise UserError(f"--live {SPAWN} with --for llama.cpp needs --base_gguf, the base model as a GGUF file.")
        if program := shutil.which("llama-server"):
            return [program, "-m", str(gguf), "--lora", str(adapter / FILE), "--port", str(port)]
        if importlib.util.find_spec("xllamacpp"):
            return [sys.executable, "-c", LLAMA_CPP, str(port), str(gguf), str(adapter / FILE)]
    if server == "jlora":
        words = ("--base", str(base), "--adapter", f"{NAME}={adapter}", "--port", str(port))
        return [sys.executable, "-m", "jlora.serve", *words]
    programs = {"vllm": "vllm (pip install vllm)", "llama.cpp": "llama-server (or: pip install xllamacpp)"}
    wanted = programs.get(server)
    if wanted is None:
        raise UserError(f"--live {SPAWN} cannot start {server}. Start it yourself, and give its address: --live URL.")
    raise UserError(f"--live {SPAWN}: {wanted} is not installed here. Install it, or give an address: --live URL.")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
