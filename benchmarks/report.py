"""A part's figures -> Markdown to read, JSON to compute with, and the picture if there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdsurgery.timing import Timing

Cell = str | int | float | None
SPREAD = ("lower quartile", "median", "upper quartile")


@dataclass(frozen=True)
class Table:
    """What a part found.

    Attributes:
        columns: what the cells of a row are.
        rows: as many cells each; None where there is nothing to say.
        notes: sentences below the table.
        picture: SVG.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    notes: tuple[str, ...] = field(default=())
    picture: str | None = None


def compared(timings: Sequence[Timing], rooflines: Mapping[str, float] | None = None, first: str = "way") -> Table:
    """A table of ratios; beside them what `benchmarks.roofline` says the same ways take on a perfect machine.

    Args:
        timings: of the ways, the first of which the others are compared with.
        rooflines: seconds of each way that has one.
        first: what the ways are.
    """
    rooflines = rooflines or {}
    base = rooflines.get(timings[0].name)
    rows: list[tuple[Cell, ...]] = []
    for timing in timings:
        least = rooflines.get(timing.name)
        limit = None if least is None or base is None else least / base
        rows.append((timing.name, timing.ratio, timing.low, timing.middle, timing.high, limit, timing.milliseconds))
    columns = (first, "ratio", *SPREAD, "ratio of the roofline", "ms, here and now")
    return Table(columns, rows)


def stacked(tables: Mapping[int, Table | None]) -> Table:
    """Tables of several batches as one; None says that a batch did not fit into memory."""
    some = next((table for table in tables.values() if table is not None), Table((), ()))
    rows: list[tuple[Cell, ...]] = []
    for batch, table in tables.items():
        if table is None:
            rows.append((batch, "does not fit", *[None] * (len(some.columns) - 1)))
        else:
            rows += [(batch, *row) for row in table.rows]
    return Table(("batch", *some.columns), rows, some.notes)


def markdown(name: str, table: Table, about: Mapping[str, str]) -> str:
    """One part's figures as a page."""
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(map(_shown, row)) for row in table.rows]
    picture = [f"![{name}]({name}.svg)", ""] if table.picture else []
    notes = [text for note in table.notes for text in (note, "")]
    facts = [f"- {key}: {value}" for key, value in about.items()]
    return "\n".join([f"# {name}", "", *picture, *(f"| {line} |" for line in lines), "", *notes, *facts, ""])


def write(folder: Path, name: str, table: Table, about: Mapping[str, str]) -> None:
    """The page, the figures, and the picture, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    document = {"about": dict(about), "rows": rows, "notes": table.notes}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(name, table, about), encoding="utf-8")
    if table.picture:
        (folder / f"{name}.svg").write_text(table.picture, encoding="utf-8")


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
