"""GGUF files of other types from one."""

import os
from pathlib import Path


def write_gguf(gguf, reader, kind, path: Path) -> None:
    """The same file with its matrices as `kind`; BF16 rounding first, so that all engines start from one model."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
            continue
        rounded = gguf.quants.quantize(data, bf16)
        stored = rounded if kind == bf16 else gguf.quants.quantize(gguf.quants.dequantize(rounded, bf16), kind)
        writer.add_tensor(tensor.name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)
