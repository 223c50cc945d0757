"""The processes that bench.py starts: writing the work to a file, training on it with PEFT and TRL, the matrix peak.

The torch processes do not use JAX, so that their memory is their own.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from jlora.bases.resolve import resolve_base

SIZE, PRODUCTS = 2048, 20  # side of the square matrices for the peak (8 x on a GPU), and number of products


def prepare(scratch: str, config_file: str, shape: str, steps: str, *overrides: str) -> None:
    """Writes `work.json`, the batches of jlora as lists of tokens, and the initial adapter."""
    import jax
    import numpy as np
    from random_base import random_base

    from jlora.adapters.settings import spec_of
    from jlora.config.files import load_config
    from jlora.data.examples import example_sizes
    from jlora.data.tokenizer import end_tokens, load_tokenizer
    from jlora.models import hf_loader
    from jlora.models.families import read_config
    from jlora.planning.data_pipeline import make_run_batches, read_examples, read_rows
    from jlora.training.setup import choose_compute

    wanted = [f"--config.max_steps={steps}", "--config.eval_data_dir=", "--config.eval_share=0.0"]
    config = load_config(config_file, [*overrides, *wanted])
    tokenizer_of = resolve_base(config.base_model, config.revision)
    directory = random_base(Path(scratch) / shape, shape, tokenizer_of) if shape else tokenizer_of
    model, tokenizer = read_config(directory), load_tokenizer(directory, config.chat_template)
    rows, _ = read_rows(config)
    examples = read_examples(config, tokenizer, end_tokens(directory, tokenizer), rows, "training", model.vocab_size)
    _, batches, _ = make_run_batches(config, model, examples, [], jax.device_count())
    compute = choose_compute(config, jax.devices()[0])
    _, _, shapes = hf_loader.abstract_model(model, spec_of(vars(config)), compute)
    layers, head = _parameters(shapes)
    chosen = [[examples[i] for i in batches.example_indices(step)] for step in range(int(steps))]
    device = jax.devices()[0]
    work = {
        "config": config_file,
        "base": shape or config.base_model,
        "directory": str(directory),
        "adapter": str(Path(scratch) / "adapter"),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "device_name": device.device_kind.replace(" ", "-").lower(),
        "dtype": np.dtype(compute.param_dtype).name,
        "settings": {"base_model": str(directory), "max_steps": int(steps), "eval_data_dir": "", "eval_share": 0.0},
        "learning_rate": config.learning_rate,
        "warmup_ratio": config.warmup_ratio,
        "lr_scheduler_type": config.lr_scheduler_type,
        "max_grad_norm": config.max_grad_norm,
        "micro_batch": config.batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "remat": config.remat,
        "layer_parameters": layers,
        "head_parameters": head,
        "layers": model.num_hidden_layers,
        "heads": model.num_attention_heads,
        "head_size": model.head_dim,
        "prefix": batches.prefix,
        "rows_of_steps": [batches.rows_used(step) for step in range(int(steps))],
        "tokens_of_steps": [sum(len(e.tokens) for e in some) for some in chosen],
        "sizes_of_steps": [[example_sizes(e.loss_mask) for e in some] for some in chosen],
        "steps": [[{"tokens": e.tokens.tolist(), "trained": e.loss_mask.tolist()} for e in some] for some in chosen],
        "lora": {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "target_modules": [*config.target_modules]},
    }
    Path(scratch, "work.json").write_text(json.dumps(work))
    first_adapter(work)


def _parameters(shapes: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of parameters of all projections, and of the output embedding."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    sizes = {"/".join(key.key for key in path): leaf.size for path, leaf in leaves}
    layers = sum(size for path, size in sizes.items() if path.startswith("layers/") and path.endswith("_proj/weight"))
    return layers, sizes.get("lm_head/weight", sizes["embed_tokens/weight"])


def first_adapter(work: dict[str, Any]) -> None:
    """Writes the adapter from which all contenders start, initialised by PEFT."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(work["directory"])
        base = transformers.AutoModelForCausalLM.from_config(config)
    settings = peft.LoraConfig(**work["lora"], task_type="CAUSAL_LM", base_model_name_or_path=work["directory"])
    model = peft.get_peft_model(base, settings, low_cpu_mem_usage=True)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = torch.zeros(parameter.shape)
            state[name.replace(".default", "")] = (
                torch.nn.init.kaiming_uniform_(value, a=5**0.5) if "lora_A" in name else value
            )
    model.peft_config["default"].save_pretrained(work["adapter"])
    import safetensors.torch

    safetensors.torch.save_file(state, Path(work["adapter"]) / "adapter_model.safetensors")


def load_peft(work: dict[str, Any]) -> Any:
    """Returns the base model with the initial adapter, with SDPA attention, on a GPU if there is one."""
    import peft
    import torch
    import transformers

    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        work["directory"], dtype=getattr(torch, work["dtype"]), attn_implementation="sdpa"
    )
    if torch.cuda.is_available():
        base = base.to("cuda")
    model = peft.PeftModel.from_pretrained(base, work["adapter"], is_trainable=True)
    if work["remat"] == "full":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def run_peft(work: dict[str, Any]) -> None:
    """Trains with the loop that PEFT users write: each micro-batch is padded to its longest example."""
    import torch
    import transformers

    model = load_peft(work)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work["learning_rate"], weight_decay=0.0)
    make_schedule = getattr(transformers, f"get_{work['lr_scheduler_type']}_schedule_with_warmup")
    count = len(work["steps"])
    schedule = make_schedule(optimizer, -int(-(work["warmup_ratio"] * count) // 1), count)
    device, size = next(model.parameters()).device, work["micro_batch"]
    for step, chosen in enumerate(work["steps"], start=1):
        start = time.perf_counter()
        targets, loss_of_step = sum(sum(e["trained"][1:]) for e in chosen), 0.0
        for first in range(0, len(chosen), size):
            ids, labels, mask = (x.to(device) for x in padded(chosen[first : first + size]))
            output = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets)
            output.loss.backward()
            loss_of_step += float(output.loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, work["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step, loss_of_step, start)


def padded(chosen: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """Returns token ids, labels and attention mask, [B, T]; labels are -100 for tokens without loss."""
    import torch

    length = max(len(e["tokens"]) for e in chosen)
    ids = torch.zeros((len(chosen), length), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(chosen):
        tokens, trained = torch.tensor(example["tokens"]), torch.tensor(example["trained"])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = torch.where(trained, tokens, -100)
    return ids, labels, mask


def run_trl(work: dict[str, Any]) -> None:
    """Trains with TRL's SFTTrainer on the same examples in the same order."""
    import tempfile

    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [example for step in work["steps"] for example in step]
    data = Dataset.from_list(
        [{"input_ids": row["tokens"], "completion_mask": [int(t) for t in row["trained"]]} for row in rows]
    )

    class Clock(transformers.TrainerCallback):
        start = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **names: Any) -> None:
            Clock.start = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **names: Any) -> None:
            if "loss" in names["logs"]:
                report(state.global_step, float(names["logs"]["loss"]), Clock.start)

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_steps=len(work["steps"]),
            per_device_train_batch_size=work["micro_batch"],
            gradient_accumulation_steps=work["accumulation"],
            learning_rate=work["learning_rate"],
            lr_scheduler_type=work["lr_scheduler_type"],
            warmup_steps=-int(-(work["warmup_ratio"] * len(work["steps"])) // 1),
            max_grad_norm=work["max_grad_norm"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            completion_only_loss=True,
            bf16=work["dtype"] == "bfloat16",
            gradient_checkpointing=work["remat"] == "full",
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(work["directory"])
        trainer = InOrder(
            model=load_peft(work),
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()


def report(step: int, loss: float, start: float) -> None:
    """Prints one line of JSON per step, for bench.py."""
    import torch

    line = {"step": step, "loss": loss, "seconds": time.perf_counter() - start}
    if torch.cuda.is_available():
        line["device_peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(line), flush=True)


def peak_jax() -> None:
    """Prints the best FLOP/s of a square matrix product in jax, in jlora's default dtype."""
    import jax
    import jax.numpy as jnp

    from jlora.models.compute_settings import default_dtype

    size = SIZE if jax.default_backend() == "cpu" else 8 * SIZE
    a = jnp.ones((size, size), default_dtype(jax.devices()[0]))
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    print(max(2 * size**3 / _seconds(lambda: product(a, a).block_until_ready()) for _ in range(PRODUCTS)))


def peak_torch() -> None:
    """Prints the same for torch."""
    import torch

    gpu = torch.cuda.is_available()
    size = 8 * SIZE if gpu else SIZE
    a = torch.ones((size, size), dtype=torch.bfloat16 if gpu else torch.float32, device="cuda" if gpu else "cpu")

    def product() -> None:
        torch.matmul(a, a)
        if gpu:
            torch.cuda.synchronize()

    product()
    print(max(2 * size**3 / _seconds(product) for _ in range(PRODUCTS)))


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "prepare":
        prepare(*arguments)
    elif what.startswith("peak-"):
        {"peak-jax": peak_jax, "peak-torch": peak_torch}[what]()
    else:
        {"peft": run_peft, "trl": run_trl}[what](json.loads(Path(arguments[0]).read_text()))
