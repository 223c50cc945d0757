"""`jlora serve [--base B] [--adapter [NAME=]DIR ...]`: OpenAI's API and a page, with an adapter for each request."""

import argparse
import importlib.util
import os
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jlora import UserError, load_model
from jlora.cli.generate import adapters_by_name, add_model_options
from jlora.common.paths import user_path
from jlora.planning.hardware import memory_limit
from jlora.serve.loading import Model, Spare, template_text
from jlora.serve.output_rules import read_rules
from jlora.serve.served_models import BASE, NAME

KEY = "JLORA_API_KEY"
GRACE = 30  # seconds that running requests have to end after SIGTERM
LOCAL = ("127.0.0.1", "localhost", "::1")
PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora serve", description="Serve a base model and its adapters with OpenAI's API, and a page to chat."
    )
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: only this machine")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; default: 8000; 0: any free one")
    parser.add_argument(
        "--api_key_file", type=user_path, help=f"a file with the key that clients must send; or set {KEY}"
    )
    parser.add_argument("--feedback", type=user_path, help="directory for what users of the page think of answers")
    parser.add_argument(
        "--adapter_root", type=user_path, help="allow clients to load adapters from below this directory"
    )
    parser.add_argument(
        "--max_adapters", type=int, default=8, help="adapters at a time, with --adapter_root; default: 8"
    )
    parser.add_argument("--max_rank", type=int, default=16, help="their rank at most, with --adapter_root; default: 16")
    parser.add_argument("--places", type=int, default=16, help="requests that are answered at a time; default: 16")
    parser.add_argument("--cache_tokens", type=int, default=16384, help="tokens of all of them; default: 16384")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; default: 64")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a request, at most; default: 600")
    parser.add_argument("--access_log", action="store_true", help="log each request's path and status")
    return parser


def main(argv: list[str]) -> None:
    """Runs `jlora serve`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not (arguments.base or arguments.adapter):
        parser.error("Set --base, --adapter, or both.")
    for key in ("places", "cache_tokens", "queue", "max_adapters", "max_rank"):
        if getattr(arguments, key) < 1:
            parser.error(f"--{key}={getattr(arguments, key)}: Expected at least 1.")
    if missing := [package for module, package in PACKAGES.items() if not importlib.util.find_spec(module)]:
        raise UserError(f"jlora serve needs {', '.join(missing)}. Run: pip install 'jlora[serve]'")
    key = _api_key(arguments.api_key_file)
    listening = _listen(arguments.host, arguments.port)
    directories = adapters_by_name(arguments.adapter)
    for name in directories:
        if name == BASE or not NAME.fullmatch(name):
            parser.error(f"--adapter {name}: No model can have this name. Choose another: --adapter NAME=DIR.")
    spare = Spare(arguments.max_adapters - len(directories), arguments.max_rank) if arguments.adapter_root else None
    base, kind, mesh = arguments.base or "", arguments.quantize_base, arguments.mesh
    model = load_model(base, directories, arguments.revision, kind, spare, mesh)
    _serve(arguments, model, directories, key, listening)


def _serve(
    arguments: argparse.Namespace, model: Model, directories: dict[str, Path], key: str, listening: socket.socket
) -> None:
    import uvicorn

    from jlora.serve.answering import Answering, Limits
    from jlora.serve.connections import TimedConnection
    from jlora.serve.engine_thread import EngineThread
    from jlora.serve.metrics import Metrics
    from jlora.serve.served_models import ServedModels
    from jlora.serve.server import Server

    rules = read_rules(arguments.output_rules) if arguments.output_rules else ()
    _check_cache(model, arguments.cache_tokens, (arguments.mesh or {}).get("tensor", 1))
    engine = model.generator.make_engine(arguments.places, arguments.cache_tokens)
    print("Compiling", flush=True)
    engine.compile_all()
    root, limits = arguments.adapter_root, Limits(arguments.queue, arguments.timeout)
    models = ServedModels(model.adapters, model.generator.directory, root, template_text(directories))
    metrics, thread = Metrics(engine), EngineThread(engine, on_failure=lambda: setattr(running, "should_exit", True))
    answering = Answering(model.generator, models, thread, metrics, rules, limits)
    server = Server(
        answering, models, thread, metrics, limits, feedback=arguments.feedback, can_load=bool(root), api_key=key
    )
    address = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    app = server.app([*LOCAL, "[::1]"] if arguments.host in LOCAL else ["*"])
    running = uvicorn.Server(
        uvicorn.Config(
            app,
            http=TimedConnection,
            log_level="info" if arguments.access_log else "warning",
            access_log=arguments.access_log,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
    )
    print(f"Serving {', '.join(models.names)} at http://{address}:{listening.getsockname()[1]}", flush=True)
    running.run(sockets=[listening])
    if thread.failed:
        sys.exit(1)


def _check_cache(model: Model, tokens: int, devices: int) -> None:
    """Raises a UserError if the cache, split over devices, does not fit into the memory beside the base model."""
    config, device = model.generator.config, jax.local_devices()[0]
    stats = device.memory_stats() or {}
    free = (memory_limit([device]) or 2**63) - stats.get("bytes_in_use", 0)
    size = jnp.dtype(model.generator.compute.compute_dtype).itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size // devices
    if tokens * token > free:
        raise UserError(
            f"--cache_tokens={tokens} needs {tokens * token / 2**30:.1f} GiB for keys and values, but only "
            f"{max(free, 0) / 2**30:.1f} GiB are free. Set it to {max(free, 0) // token // 2} or less, or add "
            "--quantize_base=nf4."
        )


def _api_key(file: Path | None) -> str:
    """Returns the key that clients must send; "": none.

    Raises:
      UserError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(KEY, "").strip()
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--api_key_file {file} cannot be read: {error}") from None
    if not key:
        raise UserError(f"--api_key_file {file} is empty. Expected a key in it.")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
      UserError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be used: {error}. Choose another --port.") from None
