"""Names of ways on stdin -> a text written by each, and "done" on stdout: run where transformers still has DoLa.

Nothing here may import `cdsurgery`, for which that transformers is too old.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from benchmarks.setting import Setting
from benchmarks.shapes import config_of
from benchmarks.text import writing


def main() -> None:
    """Write a text whenever a way is named, until no more come."""
    answers, sys.stdout = sys.stdout, sys.stderr  # where everything else goes that is said here
    setting = Setting(**json.loads(sys.argv[1]))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(setting.shape), torch_dtype=setting.torch_dtype).eval()
    ways: dict[str, Callable[[], object]] = {
        "unwrapped, there": writing(model, setting),
        "DoLa, low layers": writing(model, setting, dola_layers="low"),
        "DoLa, high layers": writing(model, setting, dola_layers="high"),
    }
    for name in sys.stdin:
        ways[name.strip()]()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
