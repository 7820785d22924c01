"""What tests of the serving code share: settings, requests, replies that are kept, and what PyTorch says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from artifacts import artifact

from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.signature import Signature, TensorSpec
from cdsurgery.export.triton.serving.errors import RequestError
from cdsurgery.export.triton.serving.request import parse_request
from cdsurgery.export.triton.serving.sequence import Sequence as Request
from cdsurgery.export.triton.serving.settings import Settings
from cdsurgery.export.triton.settings import tensors

NEW = 12

# A layer of linear attention and one with keys and values, in two dtypes: every kind of axis there is.
SIGNATURE = Signature(
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        TensorSpec("position_ids", "int64", ("batch", "sequence")),
        TensorSpec("past.0.conv", "float16", ("batch", 128, 3)),
        TensorSpec("past.0.recurrent", "float32", ("batch", 4, 16, 16)),
        TensorSpec("past_key_values.1.key", "float16", ("batch", 2, "past", 16)),
        TensorSpec("past_key_values.1.value", "float16", ("batch", 2, "past", 16)),
    ),
    outputs=(
        TensorSpec("logits", "float32", ("batch", 1, 256)),
        TensorSpec("final_logits", "float32", ("batch", 1, 256)),
        TensorSpec("selected_layer", "int64", ("batch", 1)),
        TensorSpec("entropy", "float32", ("batch", 1, 3)),
        TensorSpec("present.0.conv", "float16", ("batch", 128, 3)),
        TensorSpec("present.0.recurrent", "float32", ("batch", 4, 16, 16)),
        TensorSpec("present.1.key", "float16", ("batch", 2, "total", 16)),
        TensorSpec("present.1.value", "float16", ("batch", 2, "total", 16)),
    ),
)


def settings_of(family: str, **changes: Any) -> Settings:
    manifest = read_manifest(artifact(family))
    signature = manifest.signature
    vocabulary = int(next(spec.axes[-1] for spec in signature.results if spec.name == "logits"))
    fields: dict[str, Any] = {
        "layers": manifest.layers,
        "vocabulary": vocabulary,
        "context": 128,
        "end_tokens": (),
        "tokens": tensors(signature.tokens),
        "past": tensors(signature.past),
        "present": tensors(signature.present),
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "default_max_tokens": 16,
        "slots": 4,
        "chunk": 5,
        "queue": 100,
        "queue_timeout_seconds": None,
        "request_timeout_seconds": None,
        "threads": 1,
        "providers": {},
        "cache": None,
        "step_model": None,
        "files": {},
    }
    return Settings(**(fields | changes))


class Reply:
    """Keeps what would go to a client."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.error: RequestError | None = None
        self.gone = self.ended = False

    def send(self, outputs: dict[str, Any], final: bool) -> None:
        assert not self.ended, "a response after the last"
        self.outputs.append(outputs)
        self.ended = final

    def fail(self, error: RequestError) -> None:
        assert not self.ended
        self.error, self.ended = error, True

    def cancelled(self) -> bool:
        return self.gone

    @property
    def tokens(self) -> list[int]:
        return [int(word) for answer in self.outputs for word in answer["text_output"].item().split()]


def numbers(ids: Sequence[int]) -> str:
    """A tokenizer's decode whose text is the ids themselves."""
    return "".join(f"{token} " for token in ids)


def request(config: Settings, prompt: list[int], reply: Reply, **fields: Any) -> Request:
    tensors = {"text_input": np.array([b"a"], object), "max_tokens": np.array([NEW], np.int32)}
    given_fields = {name: np.asarray([value]) for name, value in fields.items()}
    times = {name: fields.pop(name) for name in ("deadline", "queue_deadline") if name in fields}
    given_fields = {name: value for name, value in given_fields.items() if name not in times}
    asked = parse_request(tensors | given_fields, {}, config)
    return Request(asked, prompt, reply, numbers, config.end_tokens, **times)


def prompts(vocabulary: int, count: int = 9) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, vocabulary, length).tolist() for length in generator.integers(1, 14, count)]


def truth(model: Any, prompt: list[int], length: int) -> list[int]:
    """What PyTorch generates after a prompt by itself."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else every id that is that of padding would be masked
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
    return answer[0, len(prompt) :].tolist()
