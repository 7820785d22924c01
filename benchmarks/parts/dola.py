"""DoLa, transformers' own, against the model it contrasts: the peer that also looks at layers before the last.

transformers 4.55 is the last to bring it (https://arxiv.org/abs/2309.03883), so it runs in an environment of its own,
which `make .venv-dola/ready` makes; only ratios within one environment are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.setting import Setting
from cdsurgery.timing import Timing, interleaved

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("DOLA_ENVIRONMENT", ROOT / ".venv-dola"))
WAYS = ("unwrapped, there", "DoLa, low layers", "DoLa, high layers")  # names that `benchmarks.dola` knows


def generations(setting: Setting) -> list[Timing]:
    """What `benchmarks.parts.generation` measures, with DoLa in the place of confident decoding.

    Raises:
        FileNotFoundError: the environment is not there.
    """
    with _writers(setting) as ways:
        return interleaved(ways, setting.rounds)


@contextmanager
def _writers(setting: Setting) -> Iterator[dict[str, Callable[[], None]]]:
    """What has a text written in that environment, by each of `WAYS`; the way to it and back takes 0.1 ms."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} is not there: make .venv-dola/ready makes it.")
    command = [str(python), "-m", "benchmarks.dola", json.dumps(dataclasses.asdict(setting))]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}  # it warns of its own options at every text
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=quiet, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def write(way: str) -> None:
            print(way, file=process.stdin, flush=True)
            if process.stdout.readline() != "done\n":
                process.kill()  # it may be waiting for more
                raise subprocess.CalledProcessError(process.wait(), command)

        yield {way: functools.partial(write, way) for way in WAYS}
