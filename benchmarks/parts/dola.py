"""DoLa, transformers' own, against the model it contrasts: the peer that also looks at layers before the last.

transformers 4.55 is the last to bring it (https://arxiv.org/abs/2309.03883), so it runs in an environment of its own,
which `make .venv-dola/ready` makes; only ratios within one environment are compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.setting import Setting
from benchmarks.timing import Timing, interleaved

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("DOLA_ENVIRONMENT", ROOT / ".venv-dola"))
LAYERS = {"DoLa, low layers": "low", "DoLa, high layers": "high"}


def generations(setting: Setting) -> list[Timing]:
    """What `benchmarks.parts.generation` measures, with DoLa in the place of confident decoding.

    Raises:
        FileNotFoundError: the environment is not there.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} is not there: make .venv-dola/ready makes it.")
    command = [str(python), "-m", __name__, json.dumps(dataclasses.asdict(setting))]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}  # it warns of its own options at every text
    ran = subprocess.run(command, cwd=ROOT, env=quiet, stdout=subprocess.PIPE, text=True, check=True)
    return [Timing(**timing) for timing in json.loads(ran.stdout.splitlines()[-1])]


def main() -> None:
    """In that environment: time, and print the timings as JSON."""
    from transformers import AutoModelForCausalLM

    from benchmarks.shapes import config_of
    from benchmarks.text import writing

    setting = Setting(**json.loads(sys.argv[1]))
    model = AutoModelForCausalLM.from_config(config_of(setting.shape), torch_dtype=setting.torch_dtype).eval()
    ways = {"unwrapped": writing(model, setting)}
    ways |= {name: writing(model, setting, dola_layers=layers) for name, layers in LAYERS.items()}
    timings = interleaved(ways, setting.rounds)
    print(json.dumps([dataclasses.asdict(timing) for timing in timings]))


if __name__ == "__main__":
    main()
