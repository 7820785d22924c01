"""A folder with a model and its tokenizer, and the command line run in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdsurgery.cli.main import main

LAYERS, CONTEXT = 4, 128
ESCAPE = "\x1b"
PROCESS = (sys.executable, "-c", "import sys; from cdsurgery.cli.main import main; sys.exit(main())")


def save_tiny_model(path: Path) -> Path:
    """A random model of 4 layers with a byte-level tokenizer, as `save_pretrained` writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["def f(x):\n    return x\n", "class A:\n    import os\n"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,  # the default leaves the logits near uniform, where every layer says the same
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, its output piped."""
    return subprocess.run(
        [*PROCESS, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def exit_code(arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse leaves this way
        return stop.code
