"""A random Llama of more than 2 GB -> how much memory its whole export takes, verification included, as JSON.

    python tests/large_export.py FOLDER

The kernel refuses, by RLIMIT_DATA, any private memory beyond `LIMIT` times the weights: weights, copies, buffers, and
all that Python and the libraries hold. What the limit does not count and the sampled figures show apart: pages of
model.onnx.data, which ONNX Runtime maps to read weights where they are. They are the file's own, clean, and the kernel
takes them back when it needs room. ONNX Runtime maps privately, which the limit would count in full although nothing is
ever written to it, so the limit grows by the size of that file while a session is opened.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cdsurgery
from cdsurgery import export
from cdsurgery.export.runtime.runner import OnnxRunner

LIMIT = 1.5
FIELDS = ("RssAnon", "RssFile", "VmHWM")


def random_llama() -> LlamaForCausalLM:
    """2.3 GB in float32, tied: its table is 0.46 of that, so that one held twice breaks the limit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=128256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def memory() -> dict[str, int]:
    """Bytes of this process in private memory, in mapped files, and the most of both together so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {field: int(values[field].split()[0]) * 1024 for field in FIELDS}


def limit_private_memory(size: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(size), resource.RLIM_INFINITY))


def main(folder: Path) -> dict[str, Any]:
    began = time.time()
    model = random_llama()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    wrapped = cdsurgery.wrap(model, lookback=2)
    limit_private_memory(LIMIT * weights)
    open_session = OnnxRunner.__init__

    def with_room_for_the_map(self: OnnxRunner, path: Path, *args: Any, **options: Any) -> None:
        limit_private_memory(LIMIT * weights + (path / "model.onnx.data").stat().st_size)
        open_session(self, path, *args, **options)

    OnnxRunner.__init__ = with_room_for_the_map  # type: ignore[method-assign]
    peak = dict.fromkeys(FIELDS, 0)
    done = threading.Event()

    def watch() -> None:
        # A copy of a tenth of the weights takes longer than this to make, at 10 GB/s.
        while not done.wait(0.01):
            peak.update({field: max(peak[field], value) for field, value in memory().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        export.to_onnx(wrapped, folder)
    finally:
        done.set()
        watcher.join()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return {
        "weights": weights,
        "data": sizes["model.onnx.data"],
        "graph": sizes["model.onnx"],
        "private": peak["RssAnon"] / weights,
        "mapped": peak["RssFile"] / weights,
        "together": peak["VmHWM"] / weights,
        "seconds": time.time() - began,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
