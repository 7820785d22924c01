"""Triton's kernels without a GPU: its interpreter, with two things in bfloat16 and one of NumPy put right.

Triton 3.9's interpreter keeps bfloat16 as uint16. Its products multiply the bit patterns ("we just don't support it
yet", https://github.com/triton-lang/triton/pull/11585), and its conversion from float32 cuts digits off instead of
rounding to the nearest. Both are put right here. So is what 3.6, which PyTorch 2.11 brings, makes of the bounds of a
loop: int() of an array of one number, which NumPy refuses since 2.4 and 3.9 no longer asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_tensor = triton.runtime.interpreter._patch_lang_tensor


def _wide(handle: TensorHandle) -> TensorHandle:
    """The same numbers in float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _cast_rounding(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
    if source.dtype.scalar == tl.bfloat16:
        source = _wide(source)
    if target.scalar != tl.bfloat16:
        return _cast(self, source, target)
    numbers = torch.from_numpy(np.array(source.data, dtype=np.float32))
    return TensorHandle(numbers.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def _dot_of_numbers(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(self, _wide(a), _wide(b), *rest)


def _tensor_as_bound(tensor: Any, scope: Any) -> None:
    _tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@contextmanager
def interpreted() -> Iterator[None]:
    """Run kernels in it, on CPU tensors. NumPy may subtract -inf from -inf, as kernels do where they mean it."""
    with (
        patch.object(InterpreterBuilder, "cast_impl", _cast_rounding),
        patch.object(InterpreterBuilder, "create_dot", _dot_of_numbers),
        patch.object(triton.runtime.interpreter, "_patch_lang_tensor", _tensor_as_bound),
        np.errstate(all="ignore"),
    ):
        yield
