"""Plans for GPUs, compiled by XLA's CUDA compiler without a card."""

import dataclasses
import importlib.util
import json
import os
import re

import jax
import jax.numpy as jnp
import pytest
from test_cudnn import NEEDS_COMPILER
from test_plan import SMALL, plan_of

from jlora.cli import plan
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.models.compute_settings import ComputeSettings, Packing, default_dtype
from jlora.models.families import read_config
from jlora.planning import gpu_cards, hardware
from jlora.planning.forecast import forecast, make_job
from jlora.planning.hlo import Program

pytestmark = NEEDS_COMPILER
GIB = 1 << 30
HEADS, KEYS, D, F, L = 256, 128, 256, 512, 2  # of SMALL
GRADIENTS = 4 * L * 16 * (D + HEADS + D + KEYS)  # bytes of A and B of q and v


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return file


def forecast_of(file, name, *, packing=(24, 6, 150), batch_size=8, **changes):
    """The forecast of a step on rows such as those of configs/law.py."""
    target = hardware.find_target(name, jax.devices()[:1])
    dtype = default_dtype(target.devices[0])
    kernel = "cudnn" if dtype == jnp.bfloat16 else "xla"
    config = dataclasses.replace(Config(), **{"batch_size": batch_size, "mesh": {}, "remat": "dots", **changes})

    def layout(config, ways):
        return config.gradient_accumulation_steps, config.batch_size, Shape(296, 296), Packing(*packing)

    compute = ComputeSettings(dtype, dtype, attention=kernel)
    return forecast(make_job(config, read_config(file), compute, target, layout))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gpu:h200x",
            r"Unknown --target 'gpu:h200x'\. GPUs: rtx4060, t4, .*, b200; or their memory, such as gpu:24GiB",
        ),
        ("gpu:0xh100", r"Unknown --target 'gpu:0xh100'\. Examples: "),
        ("gpu:500GiB", r"No GPU that jlora knows has that much memory\. The largest, B200, has 178 GiB"),
    ],
)
def test_unknown_gpus_are_rejected(name, message):
    with pytest.raises(UserError, match=message):
        hardware.find_target(name, jax.devices()[:1])


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gpu:l4 cannot be simulated: .*pip install 'jlora\[cuda-compiler\]'"):
        hardware.find_target("gpu:l4", jax.devices()[:1])


def test_failing_compiler_gives_a_message(small, tmp_path, monkeypatch, capfd):
    def fail(*_):
        os.write(2, b"a warning of the compiler")
        raise jax.errors.JaxRuntimeError("INTERNAL: libdevice not found")

    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"base_model": str(small), "train_data_dir": "none"}))
    monkeypatch.setattr(plan, "choose_remat", fail)
    monkeypatch.setattr(plan, "find_devices", lambda device: jax.devices()[:1])
    with pytest.raises(UserError, match=r"--target gpu:l4 failed: INTERNAL: libdevice not found\. .*cuda-compiler"):
        plan.main(["--config", str(file), "--tokens", "64", "--target", "gpu:l4"])
    assert not capfd.readouterr().err


def test_memory_selects_the_smallest_card_that_has_it():
    """A driver reports less than the nominal memory; JAX may use less again."""
    for memory, card in (("8", "RTX 4060"), ("16", "T4"), ("24", "A10G"), ("32", "RTX 5090"), ("80", "H100 SXM")):
        target = hardware.find_target(f"gpu:2x{memory}GiB", jax.devices()[:1])
        assert target.devices[0].device_kind == f"NVIDIA {card}" and len(target.devices) == 2
        assert 0.8 * int(memory) < target.limit / GIB < 0.93 * int(memory)
    assert hardware.find_target("gpu:12GiB", []).limit < 0.93 * 12 * GIB  # of a card with more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "dtype"), [("t4", "float16"), ("a100-40", "bfloat16"), ("rtx4090", "bfloat16"), ("h100", "bfloat16")]
)
def test_the_real_step_compiles_for_a_card(small, card, dtype):
    """Of compute capability 7.5, 8.0, 8.9 and 9.0; cuDNN's attention runs in each layer from 8.0 on."""
    seen = forecast_of(small, f"gpu:{card}", quantize_base="nf4")
    assert seen.job.compute.compute_dtype == jnp.dtype(dtype)
    assert seen.memory.adapter == GRADIENTS and seen.memory.total < GIB
    moved = {kind: of for kind, (_, of) in seen.kernels.items()}
    assert moved.pop("Triton product", 0) + moved.pop("cuBLAS", 0) > 0 and moved["fusion"] > 0
    runs = seen.kernels.get("cuDNN", (0, 0))[0]
    assert runs == (0 if card == "t4" else 2 * 2 * L)  # forward and backward, for each of two sizes of slots
    assert seen.work.moved == pytest.approx(sum(of for _, of in seen.kernels.values()))
    assert 0 < seen.work.flops / (8 * 296 * 1e6) < 100


@pytest.mark.slow
def test_eight_gpus_send_the_adapters_gradients_or_gather_the_base_twice(small):
    whole, split = (forecast_of(small, "gpu:8xh100", packing=(0, 1, 296), mesh=mesh) for mesh in ({}, {"fsdp": 8}))
    assert {c.kind for c in whole.collectives} == {"all-reduce"}
    assert GRADIENTS < sum(c.size * c.times for c in whole.collectives) <= GRADIENTS + 100
    gathered = sum(c.size * c.times for c in split.collectives if c.kind == "all-gather")
    assert gathered <= 2.05 * whole.memory.base and split.memory.base < 0.2 * whole.memory.base


@pytest.mark.slow
def test_seven_billion_parameters_in_four_bits_on_a_small_gpu():
    said = plan_of("7b-nf4-rtx4060")
    assert float(re.search(r"Fits: (\S+) of 6.9\d GiB", said)[1]) < 4.3, said
    assert "attention by cudnn" in said and re.search(r"cuDNN \S+ GB in 96 runs", said), said  # forward twice


LOOP = """
%fused_slice (p.0: bf16[32,64,16], i.0: s32[]) -> bf16[1,64,16] {
  %p.0 = bf16[32,64,16]{2,1,0} parameter(0)
  %i.0 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = bf16[1,64,16]{2,1,0} dynamic-slice(%p.0, %i.0, %zero, %zero), dynamic_slice_sizes={1,64,16}
}
%fused_write (p.1: bf16[32,64,16], u.1: bf16[64,16], i.1: s32[]) -> bf16[32,64,16] {
  %p.1 = bf16[32,64,16]{2,1,0} parameter(0)
  %u.1 = bf16[64,16]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %one = bf16[1,64,16]{2,1,0} bitcast(%u.1)
  ROOT %update = bf16[32,64,16]{2,1,0} dynamic-update-slice(%p.1, %one, %i.1, %zero.1, %zero.1)
}
%body (t: (s32[], bf16[32,64,16])) -> (s32[], bf16[32,64,16]) {
  %t = (s32[], bf16[32,64,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %all = bf16[32,64,16]{2,1,0} get-tuple-element(%t), index=1
  %one.2 = bf16[1,64,16]{2,1,0} fusion(%all, %i), kind=kLoop, calls=%fused_slice
  %view = bf16[64,16]{1,0} bitcast(%one.2)
  %made = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%view, %view), custom_call_target="__cublas$lt$matmul"
  %product = bf16[64,16]{1,0} get-tuple-element(%made), index=0
  %next = bf16[32,64,16]{2,1,0} fusion(%all, %product, %i), kind=kLoop, calls=%fused_write
  ROOT %both = (s32[], bf16[32,64,16]{2,1,0}) tuple(%i, %next)
}
ENTRY %main (x: bf16[32,64,16]) -> bf16[32,64,16] {
  %x = bf16[32,64,16]{2,1,0} parameter(0)
  %start = s32[] constant(0)
  %pair = (s32[], bf16[32,64,16]{2,1,0}) tuple(%start, %x)
  %loop = (s32[], bf16[32,64,16]{2,1,0}) while(%pair), condition=%end, body=%body, "known_trip_count":{"n":"32"}
  ROOT %result = bf16[32,64,16]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_bytes_that_kernels_move_are_read_from_a_program():
    """A slice of a stack reads one layer; an update in place writes one; a library's scratch memory does not count."""
    layer = 64 * 16 * 2
    kernels = {k.instruction.name: (k.kind, k.times, k.read, k.written) for k in Program(LOOP).kernels()}
    assert kernels == {
        "one.2": ("copy", 32, layer + 4, layer),
        "made": ("cuBLAS", 32, 2 * layer, layer),
        "next": ("copy", 32, layer + 4, layer),
    }


def test_every_card_has_limits():
    assert {card.capability for card in gpu_cards.CARDS.values()} <= gpu_cards.LIMITS.keys()
