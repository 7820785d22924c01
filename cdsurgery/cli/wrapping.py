"""The options of `wrap` -> flags, the same in every command that wraps."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdsurgery.config import ConfidentConfig

NAMES = ("lookback", "probability", "seed", "measure")


def add_wrapping_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags. Unset ones are None, so that `wrap`'s own defaults apply and stay in one place."""
    group = parser.add_argument_group("confident decoding")
    group.add_argument(
        "--lookback",
        type=_integer_or_share,
        metavar="K",
        help="how many layers before the final one may speak: a number (default 10), or a share of the depth such as "
        "0.25",
    )
    group.add_argument(
        "--probability",
        type=float,
        metavar="P",
        help="share of tokens that may leave the final layer (default 1; 0 is ordinary decoding)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes random draws repeatable")
    group.add_argument(
        "--measure",
        metavar="NAME",
        help="what confidence is: entropy (default), or log_p_squared to compare with the authors' published overlay",
    )


def wrapping_config(options: argparse.Namespace) -> ConfidentConfig:
    """The options asked for, checked.

    Raises:
        InvalidInputError: one is out of range.
    """
    from cdsurgery.config import ConfidentConfig

    return ConfidentConfig(**{name: getattr(options, name) for name in NAMES if getattr(options, name) is not None})


def given_flags(options: argparse.Namespace) -> list[str]:
    """The flags of this group that were set, as they are typed; `--seed` serves sampling too and is not counted."""
    return [f"--{name}" for name in NAMES if name != "seed" and getattr(options, name) is not None]


def _integer_or_share(text: str) -> int | float:
    """1 is one layer and 1.0 the whole depth, as in Python."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


_integer_or_share.__name__ = "number"  # argparse names the type in its message: "invalid number value: 'ten'"
