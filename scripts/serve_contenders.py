"""The servers that scripts/serve_load.py compares with `jlora serve`, each with the same base model and adapters.

python scripts/serve_contenders.py peft|llama.cpp PORT BASE NAME=ADAPTER ...

peft is transformers and PEFT served in the plainest way: one request at a time, `set_adapter` and `generate`.
llama.cpp is its own server, from the package xllamacpp; BASE and ADAPTER are GGUF files.
"""

import asyncio
import json
import sys
import threading
from typing import Any

PLACES = 32  # of llama.cpp
CONTEXT = 512  # tokens of each


def peft(port: int, base: str, adapters: dict[str, str]) -> None:
    """Serves /v1/chat/completions with PEFT."""
    import torch
    import uvicorn
    from peft import PeftModel
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    (first, place), *others = adapters.items()
    model = PeftModel.from_pretrained(plain, place, adapter_name=first).eval()
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    one_at_a_time = threading.Lock()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        inputs = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with one_at_a_time, torch.inference_mode():
            model.set_adapter(body["model"])
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=body["max_tokens"])[0]
        new = tokens[inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": len(new)}}

    async def chat(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(answer, json.loads(await request.body())))

    async def health(request: Request) -> Response:
        return JSONResponse({})

    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/health", health)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="warning")


def llama_cpp(port: int, base: str, adapters: dict[str, str]) -> None:
    """Runs llama.cpp's server; a request chooses adapter i with `"lora": [{"id": i, "scale": 1}]`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = base, port
    params.n_ctx, params.n_parallel, params.verbosity = PLACES * CONTEXT, PLACES, 0
    params.cache_ram_mib = 0  # this cache does not distinguish adapters
    loras = []
    for path in adapters.values():
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = path, 0.0
        loras.append(lora)
    params.lora_adapters = loras
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    run = {"peft": peft, "llama.cpp": llama_cpp}[sys.argv[1]]
    run(int(sys.argv[2]), sys.argv[3], dict(word.split("=", 1) for word in sys.argv[4:]))
