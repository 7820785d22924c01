"""Python's standard library -> a 3M-parameter Llama with its own tokenizer, in one sitting on two CPU cores.

    python examples/tiny_lm/train.py --output examples/tiny_lm

Stages: 1 corpus, 2 tokenizer, 3 tokens, 4 training, 5 near-final layers, 6 held-out loss, 7 saving. Any CPython's `Lib`
folder will do; the model card says which one made the committed weights.

Stage 5 is what a large model gets from its size: near-final layers that the unembedding can read. At 3M weights they
are unreadable after ordinary training, and sure of nonsense; a short training with an early-exit loss mends that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
# Tests repeat themselves, encodings are tables, the rest is not the library itself.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "ensurepip", "__pycache__"}
# A line break keeps its indentation, so that one token says "next line, eight spaces in".
PIECES = r"\n[ ]*| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s"
HELD_OUT_SHARE = 0.03


def read_corpus(folder: Path) -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts): one text a file, split by a hash of the file's name."""
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        (held_out if share < HELD_OUT_SHARE else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with `vocabulary` entries, the end-of-text mark included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], dropout: float = 0.0) -> Tensor:
    """All texts as one int64 stream, each opened by the end-of-text mark.

    `dropout` is BPE-dropout (Provilkov et al., 2020, arXiv 1910.13267): some merges are skipped, so that the model has
    seen words cut in odd places and a prompt may end anywhere, as in `def ` with its trailing space.
    """
    tokenizer.model.dropout = dropout or None
    mark = tokenizer.token_to_id(END)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream.append(mark)
        stream.extend(encoding.ids)
    tokenizer.model.dropout = None
    return torch.tensor(stream)


def build_model(vocabulary: int, context: int) -> LlamaForCausalLM:
    """A deep and narrow Llama: 12 layers, because confident decoding needs layers to choose from."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def learning_rate_share(step: int, steps: int) -> float:
    """Warm up over 2 % of the steps, hold, fall linearly to zero over the last 60 %."""
    return min(1.0, (step + 1) / (0.02 * steps + 1), (steps - step) / (0.6 * steps))


def final_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the final layer, nats per token; rows `[B, T]`."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def near_final_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """The final layer's loss plus that of one random layer of the upper half, read through the same norm and head.

    The early-exit loss of LayerSkip (Elhoushi et al., 2024, arXiv 2404.16710, section 4.1).
    """
    out = model(input_ids=rows, labels=rows, use_cache=False, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    state = out.hidden_states[int(torch.randint(layers // 2, layers, ()))]
    logits = model.lm_head(model.model.norm(state))
    return out.loss + model.loss_function(logits=logits, labels=rows, vocab_size=model.config.vocab_size)


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    loss_of: Callable[[LlamaForCausalLM, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    window: int,
    rate: float,
) -> float:
    """Train in place with AdamW on random windows of the stream; returns seconds."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    offsets = torch.arange(window)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_share(step, steps)
        rows = stream[torch.randint(len(stream) - window, (batch, 1)) + offsets]
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:5d} of {steps}  loss {loss.item():.3f}  {seconds:6.0f} s", flush=True)
    return time.perf_counter() - started


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, window: int) -> float:
    """Mean cross-entropy in nats per token over consecutive windows of the held-out stream."""
    model.eval()
    rows = stream[: len(stream) // window * window].view(-1, window)
    losses = [model(input_ids=part, labels=part, use_cache=False).loss * len(part) for part in rows.split(16)]
    return float(sum(losses) / len(rows))


def main() -> None:
    """Run all stages and leave weights, tokenizer, training.json in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, tokenizer and training.json")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a CPython Lib folder")
    parser.add_argument("--steps", type=int, default=5000, help="of ordinary training")
    parser.add_argument(
        "--near-final-steps", type=int, default=3000, help="with the early-exit loss, at a third the rate"
    )
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--window", type=int, default=256, help="tokens a window")
    parser.add_argument("--context", type=int, default=1024, help="positions the saved model allows")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    options = parser.parse_args()
    torch.manual_seed(0)

    training, held_out = read_corpus(options.library)
    tokenizer = train_tokenizer(training, options.vocabulary)
    stream = torch.cat([encode(tokenizer, training), encode(tokenizer, training, dropout=0.03)])
    test_stream = encode(tokenizer, held_out)
    model = build_model(options.vocabulary, options.context)
    print(
        f"{len(training)} files, {len(stream) / 1e6:.2f}M tokens in two cuts, "
        f"{model.num_parameters() / 1e6:.2f}M weights"
    )

    sizes = {"batch": options.batch, "window": options.window}
    seconds = train(model, stream, final_loss, steps=options.steps, rate=options.rate, **sizes)
    near = options.near_final_steps
    seconds += train(model, stream, near_final_loss, steps=near, rate=options.rate / 3, **sizes)
    finish(model, tokenizer, (training, held_out), test_stream, seconds, options)


def finish(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    texts: tuple[list[str], list[str]],
    test_stream: Tensor,
    seconds: float,
    options: argparse.Namespace,
) -> None:
    """Measure the held-out loss and save weights, tokenizer and the record of how they were made."""
    training, held_out = texts
    loss = held_out_loss(model, test_stream, options.window)
    characters = sum(len(text) for text in held_out)
    record = {
        "library": f"CPython {platform.python_version()}",
        "training_files": len(training),
        "training_characters": sum(len(text) for text in training),
        "held_out_files": len(held_out),
        "held_out_characters": characters,
        "steps": options.steps,
        "near_final_steps": options.near_final_steps,
        "tokens_seen": (options.steps + options.near_final_steps) * options.batch * options.window,
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_bits_per_character": round(loss / math.log(2) * len(test_stream) / characters, 4),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    model.eval().save_pretrained(options.output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=options.context
    ).save_pretrained(options.output)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
