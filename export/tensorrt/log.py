"""What TensorRT says and how far it is -> a log that errors quote, and a callback that can stop the build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Called with the name of a phase and the share of it that is done, in [0, 1].
Progress = Callable[[str, float], None]


def make_log(trt: Any) -> Any:
    """An `ILogger` that keeps what it is told, but for TensorRT's verbose messages.

    Args:
        trt: the module.

    Returns:
        A logger with `lines`, all messages with their severities, and `errors`, the texts of the errors.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # its base is known when it is made
        """Keeps messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from its own threads too."""
            if severity <= trt.ILogger.INFO:
                self.lines.append(f"{severity.name} {message}")
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Log()


def make_monitor(trt: Any, progress: Progress) -> Any:
    """An `IProgressMonitor` that tells `progress`, and stops the build if that raises.

    An exception must not travel through TensorRT's own code, an interrupt from the keyboard included: the monitor
    asks TensorRT to stop, and keeps the exception as `stopped_by` for whoever started the build.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base is known when it is made
        """Passes progress on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Called by TensorRT."""
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Called by TensorRT; False stops the build."""
            self._tell(phase_name, step + 1)
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            """Called by TensorRT."""

        def _tell(self, phase: str, done: int) -> None:
            if self.stopped_by is None:
                try:
                    progress(phase, min(done / max(self.steps.get(phase, 1), 1), 1.0))
                except BaseException as error:  # kept, and raised after the build
                    self.stopped_by = error

    return Monitor()
