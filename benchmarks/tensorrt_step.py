"""What the confident head costs in TensorRT: decode steps with and without it, in turns, beside what the bytes say.

    python -m benchmarks.tensorrt_step                         # Qwen3-0.6B, Llama-3.1-8B, gpt-oss-20b; needs a GPU
    python -m benchmarks.tensorrt_step qwen3-0.6b --context 1024 --lookback 10

Real shapes, random weights, bfloat16. Two engines of the same weights run in turns on the same inputs; a line gives the
median step of each, their ratio, and the ratio of a roofline: every weight and the cache read once, the extra rows of
the head computed, their logits written and read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import cdsurgery
from benchmarks.plain import plain_artifact
from benchmarks.shapes import SHAPES, random_model
from cdsurgery import export
from cdsurgery.export.runtime.lengths import shape_of
from cdsurgery.export.signature import BATCH, PAST, SEQUENCE, TOTAL, Signature, torch_dtype
from cdsurgery.export.tensorrt import EngineSession

MODELS = ("qwen3-0.6b", "llama-3.1-8b", "gpt-oss-20b")
BATCHES = (1, 8, 32, 128)
ROUNDS, WARM = 60, 10


def extra_share(
    shapes: Any, batch: int, context: int, lookback: int, bandwidth: float = 4.3e12, flops: float = 790e12
) -> float:
    """What a roofline says that the head adds to a decode step, as a share of it.

    The step reads every weight that it needs once, and the cache. The unembedding is read once whatever the number of
    rows; K more rows take time where computing takes longer than reading; their float32 logits are written and read.

    Args:
        shapes: the model; on the meta device will do.
        batch, context: rows, and tokens in the cache of each.
        lookback: K.
        bandwidth, flops: bytes and floating-point operations a second; those of an H200 in bfloat16 if not given.
    """
    config = shapes.config
    vocabulary, width = shapes.get_output_embeddings().weight.shape
    experts = sum(weight.numel() for name, weight in shapes.named_parameters() if ".experts." in name)
    embedding = 0 if config.tie_word_embeddings else vocabulary * width
    touched = 1.0
    if experts:  # the share of the experts that some row is sent to
        touched = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** batch
    weights = 2 * (sum(weight.numel() for weight in shapes.parameters()) - embedding - experts * (1 - touched))
    heads = config.num_key_value_heads * getattr(config, "head_dim", width // config.num_attention_heads)
    cache = batch * context * config.num_hidden_layers * 2 * heads * 2
    projections = [max(2 * rows * batch * width * vocabulary / flops, 2 * vocabulary * width / bandwidth)
                   for rows in (1, lookback + 1)]  # fmt: skip
    logits = lookback * batch * vocabulary * 4 * 2 / bandwidth
    return float((projections[1] - projections[0] + logits) / ((weights + cache) / bandwidth))


def in_turns(sessions: Mapping[str, Any], batch: int, context: int) -> dict[str, float]:
    """Median milliseconds of a decode step of each session, in turns on the same tensors."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    feed = decode_feed(next(iter(sessions.values())).signature, batch, context, "cuda")
    for _ in range(WARM + ROUNDS):
        for name, session in sessions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            session.run(feed)
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: median(of[WARM:]) for name, of in times.items()}


def decode_feed(signature: Signature, batch: int, context: int, device: str) -> dict[str, torch.Tensor]:
    """One new token a row, on a cache of random numbers."""
    lengths = {BATCH: batch, SEQUENCE: 1, PAST: context, TOTAL: context + 1}
    feed = {}
    for spec in signature.inputs:
        shape, dtype = shape_of(spec.axes, lengths), torch_dtype(spec)
        filling = {"attention_mask": 1, "position_ids": context, "input_ids": 7}.get(spec.name)
        feed[spec.name] = (
            torch.randn(shape, device=device).to(dtype)
            if filling is None
            else torch.full(shape, filling, dtype=dtype, device=device)
        )
    return feed


def measure(name: str, context: int, lookback: int, batches: list[int], package: str | None, place: Path) -> None:
    """Build both engines of a model and print a line for each batch."""
    model = cdsurgery.wrap(random_model(name, torch.bfloat16), lookback=lookback)
    export.to_onnx(model, place / "confident", parity=False)
    plain_artifact(model, place / "plain")
    del model
    torch.cuda.empty_cache()
    sizes: dict[str, Any] = {"batch": max(batches), "sequence": 1, "past": context, "package": package}
    sessions = {}
    for kind in ("plain", "confident"):
        export.to_tensorrt(place / kind, place / f"{kind}-engine", **sizes)
        sessions[kind] = EngineSession(place / f"{kind}-engine")
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(SHAPES[name])
    for batch in batches:
        try:
            found = in_turns(sessions, batch, context)
        except torch.OutOfMemoryError:
            print(f"| {name} | {batch} | does not fit | | | |", flush=True)
            continue
        ratio = found["confident"] / found["plain"]
        share = extra_share(shapes, batch, context, lookback)
        cells = [f"{found['plain']:.2f}", f"{found['confident']:.2f}", f"{ratio:.3f}", f"{1 + share:.3f}"]
        print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache")
    parser.add_argument("--lookback", type=int, default=10)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--package", choices=("tensorrt", "tensorrt_rtx"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"a speed is a GPU's, and this PyTorch ({torch.__version__}) sees none")
    print(f"{torch.cuda.get_device_name()}, context {options.context}, lookback {options.lookback}\n")
    print(
        "| model | batch | plain ms | confident ms | ratio | ratio of the roofline (H200) |\n|---|---|---|---|---|---|"
    )
    for name in options.models:
        with tempfile.TemporaryDirectory() as place:
            batches = options.batch or list(BATCHES)
            measure(name, options.context, options.lookback, batches, options.package, Path(place))


if __name__ == "__main__":
    main()
