"""What the scheduler does -> numbers for Prometheus, through Triton's custom metrics.

Counters only ever grow, so rates and shares are the reader's: tokens a second are `rate(cdsurgery_tokens_total[1m])`,
the share of moved tokens is moved over tokens, the mean depth is depth over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# Field of `Counts` -> name and help of the metric.
COUNTERS = {
    "prompt_tokens": ("cdsurgery_prompt_tokens_total", "Prompt tokens that were taken in"),
    "tokens": ("cdsurgery_tokens_total", "Tokens that were generated"),
    "moved": ("cdsurgery_moved_tokens_total", "Generated tokens that an earlier layer than the final one chose"),
    "depth": ("cdsurgery_depth_total", "Layers between the final and the selected one, summed over generated tokens"),
    "finished": ("cdsurgery_finished_requests_total", "Requests that were answered to the end"),
    "failed": ("cdsurgery_failed_requests_total", "Requests that were taken and then got an error"),
    "refused": ("cdsurgery_refused_requests_total", "Requests that were not taken: malformed, too long, or too many"),
    "cancelled": ("cdsurgery_cancelled_requests_total", "Requests whose client went away"),
}
GAUGES = {
    "running": ("cdsurgery_running_requests", "Requests in a slot"),
    "queued": ("cdsurgery_queued_requests", "Requests that wait for a slot"),
}


@dataclass
class Counts:
    """Numbers since the model was loaded; `running` and `queued` are those of now."""

    prompt_tokens: int = 0
    tokens: int = 0
    moved: int = 0
    depth: int = 0
    finished: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    running: int = 0
    queued: int = 0


class TritonMetrics:
    """The counts as Triton shows them at its metrics port."""

    def __init__(self, utils: Any, labels: dict[str, str]) -> None:
        """Register the metrics.

        Args:
            utils: `triton_python_backend_utils`.
            labels: name, version and instance of the model.
        """
        self._families = [  # a family that nobody holds takes its metrics with it
            utils.MetricFamily(name=name, description=text, kind=kind)
            for kind, table in ((utils.MetricFamily.COUNTER, COUNTERS), (utils.MetricFamily.GAUGE, GAUGES))
            for name, text in table.values()
        ]
        metrics = [family.Metric(labels=labels) for family in self._families]
        self._metrics = dict(zip((*COUNTERS, *GAUGES), metrics, strict=True))
        self._shown = Counts()

    def show(self, counts: Counts) -> None:
        """Bring Triton's numbers up to these; each that changed is a message to the server."""
        for field in fields(counts):
            value, shown = getattr(counts, field.name), getattr(self._shown, field.name)
            if value != shown:
                metric = self._metrics[field.name]
                metric.set(value) if field.name in GAUGES else metric.increment(value - shown)
                setattr(self._shown, field.name, value)
