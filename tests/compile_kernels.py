"""The launch of every kind of kernel, but for the launch itself -> what was compiled, as JSON; run as a script.

The interpreter takes code that the compiler refuses, and has neither shared memory nor tensor cores. Triton compiles
for a GPU that is not there, given a driver that names one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cdsurgery.kernels.launch import launch, launch_compact, launch_pick, launch_pick_further

run = JITFunction.run


def compiled(
    architecture: int, dtype: torch.dtype, rows: int, width: int, everything: bool, some: bool
) -> list[dict[str, Any]]:
    """What a launch compiles: for each kernel its name, instructions of interest, and bytes of memory that it takes."""
    kernels: list[Any] = []

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    driver = SimpleNamespace(
        get_current_device=lambda: architecture,  # what is compiled is kept for a device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
    )
    triton.runtime.driver.set_active(driver)
    with patch.object(JITFunction, "run", only_compile):
        state, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(300, width, dtype=dtype)
        products = torch.zeros(rows if everything else 0, 300, dtype=dtype)
        bias = torch.zeros(300, dtype=dtype) if everything else None
        scale, softcap = (0.5, 30.0) if everything else (1.0, None)
        active = torch.tensor(rows) if some else None
        launch(state, weight, bias, scale, softcap, everything, 300, active, products)
        entropy, picks = torch.zeros(11, rows), torch.zeros(11 * rows, 300, dtype=dtype)
        allowed = torch.ones(rows, dtype=torch.bool) if some else None
        numbers = torch.zeros(rows, dtype=torch.int64)
        launch_pick(entropy, picks, allowed, numbers, picks[:rows])
        read, deeper = torch.zeros(4, rows), torch.zeros(rows, 7)
        launch_pick_further(numbers, picks[:rows], read, numbers, deeper, picks[: 7 * rows], numbers, entropy)
        launch_compact(torch.ones(rows, dtype=torch.bool), numbers, numbers, numbers[0])
    words = ("mma.sync", "wgmma.mma_async", "tf32", "cp.async.cg")
    return [
        {
            "name": kernel.metadata.name,
            "shared": kernel.metadata.shared,
            "stack": stack_bytes(kernel.asm["cubin"]),
            "instructions": [word for word in words if word in kernel.asm["ptx"]],
        }
        for kernel in kernels
    ]


def stack_bytes(cubin: bytes) -> int:
    """Of a thread, where registers that are too many go."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(usage.partition("STACK:")[2].split()[0])


if __name__ == "__main__":
    cases = (
        (80, torch.bfloat16, 11, 128, True, True),
        (90, torch.float16, 200, 128, False, False),
        (90, torch.float32, 11, 77, True, True),
        (80, torch.float32, 22, 128, False, False),
        (90, torch.bfloat16, 200, 128, False, True),
        (90, torch.bfloat16, 11, 128, False, False),
    )
    print(json.dumps([compiled(*case) for case in cases]))
