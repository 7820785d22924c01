"""A model -> what writes a text of a given length with it, in any transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.setting import Setting


def writing(model: Any, setting: Setting, **options: Any) -> Callable[[], object]:
    """`new` tokens after `batch` prompts of `context` tokens, greedy; `options` are those of `generate`."""
    size = (setting.batch, setting.context)
    ids = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    model.generation_config.eos_token_id = None  # nothing ends before it is as long as was asked for
    said = {"do_sample": False, "max_new_tokens": setting.new, "pad_token_id": 0} | options
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **said)
