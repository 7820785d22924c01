"""The tensors and parameters of a Triton request -> what to generate, or an error that says what does not fit.

The names are those of the requests that Triton's OpenAI frontend makes for every backend but vLLM's.
https://github.com/triton-inference-server/server/blob/main/python/openai/openai_frontend/engine/utils/triton.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .sampling import SamplingOptions
from .settings import Settings

# Name -> Triton's data type and shape without the batch; what config.pbtxt declares, text_input first.
INPUTS: dict[str, tuple[str, int]] = {
    "text_input": ("TYPE_STRING", 1),
    "stream": ("TYPE_BOOL", 1),
    "max_tokens": ("TYPE_INT32", 1),
    "stop_words": ("TYPE_STRING", -1),
    "temperature": ("TYPE_FP32", 1),
    "top_p": ("TYPE_FP32", 1),
    "top_k": ("TYPE_INT32", 1),
    "frequency_penalty": ("TYPE_FP32", 1),
    "presence_penalty": ("TYPE_FP32", 1),
    "min_p": ("TYPE_FP32", 1),
    "repetition_penalty": ("TYPE_FP32", 1),
    "seed": ("TYPE_UINT64", 1),
    "exclude_input_in_output": ("TYPE_BOOL", 1),
    "return_num_input_tokens": ("TYPE_BOOL", 1),
    "return_num_output_tokens": ("TYPE_BOOL", 1),
    "confident": ("TYPE_BOOL", 1),
    "return_layers": ("TYPE_BOOL", 1),
}
OUTPUTS: dict[str, tuple[str, int]] = {
    "text_output": ("TYPE_STRING", 1),
    "num_input_tokens": ("TYPE_INT32", 1),
    "num_output_tokens": ("TYPE_INT32", 1),
    "selected_layer": ("TYPE_INT32", -1),
    "entropy": ("TYPE_FP32", -1),
    "changed": ("TYPE_BOOL", -1),
}
# An output -> the input without which it does not come.
FLAGS = {
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
    "selected_layer": "return_layers",
    "entropy": "return_layers",
    "changed": "return_layers",
}
# Of stop words: each is looked for in the text at every step, in the thread that decodes for all.
WORDS, CHARACTERS = 64, 4096
PENALTY = 2.0  # the range of OpenAI's API
LEAST_FACTOR = 1e-3  # of a repetition penalty, which divides


@dataclass(frozen=True)
class GenerationRequest:
    """One request, checked.

    Attributes:
        text: the prompt.
        max_tokens: how many to generate at most.
        stop_words: texts that end the answer and are not part of it.
        sampling: how a token is chosen.
        stream: several responses, as text comes, or one at the end.
        echo: whether the answer begins with the prompt.
        confident: decode from the selected layer, or from the final one.
        layers: whether to return selected_layer, entropy and changed.
        input_count, output_count: whether to return num_input_tokens and num_output_tokens.
    """

    text: str
    max_tokens: int
    stop_words: tuple[str, ...]
    sampling: SamplingOptions
    stream: bool
    echo: bool
    confident: bool
    layers: bool
    input_count: bool
    output_count: bool


def parse_request(
    tensors: Mapping[str, NDArray[Any]],
    parameters: Mapping[str, Any],
    settings: Settings,
    outputs: Collection[str] = OUTPUTS,
) -> GenerationRequest:
    """Check a request.

    Args:
        tensors: the inputs that came, by name.
        parameters: the request's parameters, among which `/generate` puts every field that is no input.
        settings: with the defaults.
        outputs: the names of those asked for; where a client names none, Triton names all.

    Raises:
        RequestError: an unknown field, a value outside of what is allowed, or an output whose flag is not set.
    """
    if unknown := sorted(parameters):
        raise RequestError(
            "INVALID_ARG", f"Unknown fields: {', '.join(unknown)}. This model takes {', '.join(INPUTS)}."
        )
    read = _Reader(tensors)
    for name in sorted(outputs) if len(outputs) < len(OUTPUTS) else ():
        if name in FLAGS and not read.flag(FLAGS[name], False):
            raise RequestError("INVALID_ARG", f"{name} is asked for, and comes with {FLAGS[name]}: true. Set it.")
    drawn = {"top_p", "top_k", "min_p"} & tensors.keys()
    greedy = settings.temperature if not drawn else settings.temperature or 1.0
    sampling = SamplingOptions(
        temperature=read.number("temperature", greedy, 0.0, math.inf),
        top_p=read.number("top_p", settings.top_p, 0.0, 1.0),
        top_k=read.integer("top_k", settings.top_k, 0),
        min_p=read.number("min_p", settings.min_p, 0.0, 1.0),
        repetition_penalty=read.number("repetition_penalty", settings.repetition_penalty, LEAST_FACTOR, math.inf),
        frequency_penalty=read.number("frequency_penalty", 0.0, -PENALTY, PENALTY),
        presence_penalty=read.number("presence_penalty", 0.0, -PENALTY, PENALTY),
        seed=read.integer("seed", None, 0),
    )
    if not (text := read.text("text_input")):
        raise RequestError("INVALID_ARG", "text_input is empty. Give the beginning of a text.")
    return GenerationRequest(
        text=text,
        max_tokens=read.integer("max_tokens", settings.default_max_tokens, 1),
        stop_words=read.words("stop_words"),
        sampling=sampling,
        stream=read.flag("stream", False),
        echo=not read.flag("exclude_input_in_output", True),
        confident=read.flag("confident", True),
        layers=read.flag("return_layers", False),
        input_count=read.flag("return_num_input_tokens", False),
        output_count=read.flag("return_num_output_tokens", False),
    )


def encode_prompt(
    request: GenerationRequest, encode: Callable[[str], list[int]], longest_entry: int, settings: Settings
) -> list[int]:
    """The ids of the prompt, of which the model has all, and which leave room for the answer.

    Args:
        request: with the text.
        encode: text -> ids, special tokens included.
        longest_entry: characters of the longest entry of the tokenizer's vocabulary. A prompt longer than a whole
            context of those is refused before it is cut into tokens, which takes seconds for megabytes.
        settings: with vocabulary and context.

    Raises:
        RequestError: it has no tokens, ids that the model does not have, or too many.
    """
    limit = settings.context * longest_entry
    if len(request.text) > limit:
        raise RequestError(
            "INVALID_ARG",
            f"text_input has {len(request.text)} characters; the model's context of {settings.context} tokens holds "
            f"{limit} at most. Shorten the prompt.",
        )
    ids = encode(request.text)
    if not ids:
        raise RequestError("INVALID_ARG", "text_input has no tokens for this tokenizer. Give another beginning.")
    if wrong := [token for token in ids if not 0 <= token < settings.vocabulary]:
        raise RequestError(
            "INVALID_ARG",
            f"The tokenizer made token id {wrong[0]} of text_input, but the model has ids 0 to "
            f"{settings.vocabulary - 1}. Leave out the text that stands for it.",
        )
    if (total := len(ids) + request.max_tokens) > settings.context:
        raise RequestError(
            "INVALID_ARG",
            f"text_input has {len(ids)} tokens; with max_tokens {request.max_tokens} that is {total}, and the context "
            f"holds {settings.context}. Shorten the prompt or lower max_tokens.",
        )
    return ids


class _Reader:
    """Single values out of arrays of any shape with one element."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = tensors

    def _one(self, name: str, default: Any) -> Any:
        if name not in self._tensors:
            return default
        array = self._tensors[name]
        if array.size != 1:
            raise RequestError("INVALID_ARG", f"{name} has shape {list(array.shape)}; it must be one value.")
        return array.reshape(-1)[0]

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._one(name, default))

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = float(self._one(name, default))
        if not (low <= value <= high and math.isfinite(value)):
            wanted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
            raise RequestError("INVALID_ARG", f"{name} is {value:g}; it must be {wanted}.")
        return value

    def integer(self, name: str, default: Any, low: int) -> Any:
        value = self._one(name, default)
        if value is not None and (value := int(value)) < low:
            raise RequestError("INVALID_ARG", f"{name} is {value}; it must be at least {low}.")
        return value

    def text(self, name: str) -> str:
        return _decoded(name, self._one(name, b""))

    def words(self, name: str) -> tuple[str, ...]:
        array = self._tensors.get(name, np.empty(0, object))
        if array.size > WORDS:
            raise RequestError("INVALID_ARG", f"{name} holds {array.size} texts; it may hold {WORDS}.")
        words = tuple(_decoded(name, word) for word in array.reshape(-1))
        if (length := sum(map(len, words))) > CHARACTERS:
            raise RequestError("INVALID_ARG", f"{name} holds {length} characters; it may hold {CHARACTERS}.")
        if "" in words:
            raise RequestError("INVALID_ARG", f"{name} holds an empty text, which would stop before the first token.")
        return words


def _decoded(name: str, value: bytes | str) -> str:
    try:
        return value if isinstance(value, str) else bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError("INVALID_ARG", f"{name} is not UTF-8: {error}.") from error
