"""Tiny random decoders -> ONNX files as other exporters write them: the folders in `tests/foreign/`.

Run it in an environment of the tool in question (versions as given), from the root of the repository:

    pip install optimum-onnx==0.1.0 transformers==4.57.6 accelerate torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0
    python tests/foreign_files.py optimum
    pip install onnxruntime-genai==0.18.0 transformers==5.23.0 torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0
    python tests/foreign_files.py genai

The weights follow from their names alone, so that a test can build the same model in PyTorch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent / "foreign"
LAYERS, VOCABULARY, HIDDEN = 4, 96, 32

_USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, "n_inner": 32, "vocab_size": VOCABULARY}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _USUAL),
    "qwen3": ("qwen3", _USUAL | {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        _USUAL
        | {
            "final_logit_softcapping": 8.0,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,
        },
    ),
    "phi": ("phi", _USUAL | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "cohere": (
        "cohere",
        _USUAL | {"num_key_value_heads": 2, "rope_theta": 10000.0, "logit_scale": 0.7, "tie_word_embeddings": True},
    ),
    "gpt2": ("gpt2", _GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
}
# name of the folder -> the model, and the options of the tool
OPTIMUM = ("llama", "qwen3", "gpt2", "gemma2", "phi", "cohere")
GENAI: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "llama": ("llama", "fp32", ()),
    "qwen3-pruned": ("qwen3", "fp32", ("prune_lm_head=1",)),
    "gemma2": ("gemma2", "fp32", ()),
    "llama-int4": ("llama", "int4", ()),
    "qwen3-int4-shared": ("qwen3", "int4", ("shared_embeddings=1", "accuracy_level=1")),
    "llama-int4-qdq": ("llama", "int4", ("use_qdq=1",)),
}


def tiny_model(name: str) -> Any:
    """The model of one row of `CONFIGS`, wide enough that its layers disagree, without a bias or norm weight of 0 or 1.

    numpy's RandomState is frozen: it gives the same numbers in every version.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            generator = np.random.RandomState(zlib.crc32(path.encode()))
            values = generator.standard_normal(tuple(parameter.shape)).astype(np.float32)
            if path.endswith("weight") and parameter.ndim == 2:
                values *= 0.5 if "emb" in path or "wte" in path or "lm_head" in path else 0.25
            else:
                values = values * 0.2 + (1.0 if "norm" in path or "ln_" in path else 0.0) * path.endswith("weight")
            parameter.copy_(torch.from_numpy(values))
    return model


def save_model(name: str, folder: Path) -> None:
    """As `save_pretrained` does, with a tokenizer, which onnxruntime-genai's builder wants."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_model(name).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0", bos_token="w1").save_pretrained(
        folder
    )


def _optimum(folder: Path, names: list[str]) -> None:
    for name in names or OPTIMUM:
        save_model(name, folder / name)
        out = folder / f"{name}-onnx"
        options = ["--task", "text-generation-with-past", "--library", "transformers"]
        _run("optimum.commands.optimum_cli", "export", "onnx", "--model", folder / name, *options, out)
        _keep(out, FOLDER / f"optimum-{name}")


def _genai(folder: Path, names: list[str]) -> None:
    for name in names or GENAI:
        model, precision, options = GENAI[name]
        save_model(model, folder / name)
        out, cache = folder / f"{name}-onnx", folder / "cache"
        places = ["-i", folder / name, "-o", out, "-c", cache]
        extra = ["--extra_options", "hf_token=false", *options]
        _run("onnxruntime_genai.models.builder", *places, "-p", precision, "-e", "cpu", *extra)
        _keep(out, FOLDER / f"genai-{name}")


def _run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def _keep(made: Path, place: Path) -> None:
    """The graph, its weights and its configs; tokenizers would be the same everywhere."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path in made.iterdir():
        if path.name.startswith("model.onnx") or (path.name.endswith("config.json") and "tokenizer" not in path.name):
            shutil.copy(path, place / path.name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        tool, *names = sys.argv[1:]
        {"optimum": _optimum, "genai": _genai}[tool](Path(work), names)
