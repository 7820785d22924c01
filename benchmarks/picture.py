"""What a step takes beyond the unwrapped one, over the batch -> a picture, with the roofline drawn in."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence


def overhead_picture(overheads: Mapping[str, Sequence[tuple[int, float, float]]]) -> str:
    """SVG text.

    Args:
        overheads: way -> (batch, share of the unwrapped step that was measured, the roofline's).
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "the same figures make the same file"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for way, points in overheads.items():
        batches, measured, limits = zip(*points, strict=True)
        (line,) = axes.plot(batches, [100 * share for share in measured], marker="o", label=f"{way}, measured")
        axes.plot(
            batches, [100 * share for share in limits], linestyle="--", color=line.get_color(), label=f"{way}, roofline"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="rows of a step", ylabel="% of the unwrapped step more")
    axes.axhline(0, color="gray", linewidth=0.8)  # the unwrapped step; below it is quicker
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return file.getvalue()
