"""What an engine is asked to be -> flags of the package's builder, or why it cannot have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.tensorrt.package import builds_ahead_of_time

# What is switched on for every engine. STRICT_NANS: without it the builder takes x - x for 0 and 0 * x for 0, and hides
# a NaN that the scan has to see.
ALWAYS = ("STRICT_NANS",)
# What is switched off: TF32 would round the products of a float32 graph to ten bits.
NEVER = ("TF32",)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        targets: GPU architectures such as "SM89" or "SM120", for TensorRT-RTX, which builds ahead of time; empty for
            what the package does by itself: TensorRT builds for the GPU that is there, TensorRT-RTX for all it knows.
        hardware_compatible: an engine of TensorRT for every GPU from Ampere on, not only this one.
        version_compatible: an engine of TensorRT that later versions can run too, through the lean runtime of this
            one, which they are given as a file (`export.load`); the engine holds no code for the host.
        weight_streaming: weights may stay in the host's memory and come as they are needed.
        refittable: weights can be replaced without building again.
    """

    targets: Sequence[str] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    weight_streaming: bool = False
    refittable: bool = False

    def flags(self) -> list[str]:
        """The names of the builder flags that are on."""
        wanted = {
            "VERSION_COMPATIBLE": self.version_compatible,
            # Otherwise the engine would bring a runtime, which is code for the host; loading that stays forbidden.
            "EXCLUDE_LEAN_RUNTIME": self.version_compatible,
            "WEIGHT_STREAMING": self.weight_streaming,
            "REFIT": self.refittable,
        }
        return [*ALWAYS, *(name for name, on in wanted.items() if on)]

    def configure(self, trt: Any, config: Any) -> None:
        """Set flags, targets and compatibility on an `IBuilderConfig`.

        Raises:
            InvalidInputError: the package has not what is asked for, or knows no such target.
        """
        ahead_of_time = builds_ahead_of_time(trt)
        for name in NEVER:
            config.clear_flag(getattr(trt.BuilderFlag, name))
        for name in self.flags():
            if not hasattr(trt.BuilderFlag, name):
                raise InvalidInputError(f"{trt.__name__} {trt.__version__} has no {name}. Leave it out.")
            config.set_flag(getattr(trt.BuilderFlag, name))
        if self.version_compatible and ahead_of_time:
            raise InvalidInputError(
                f"{trt.__name__} builds no engines for its later versions. Leave version_compatible out, and build "
                "again when it changes."
            )
        if self.hardware_compatible:
            if ahead_of_time:
                raise InvalidInputError(
                    f"{trt.__name__} has no hardware compatibility level: its engines are for a list of architectures. "
                    "Pass targets instead."
                )
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.targets:
            known = target_names(trt)
            if isinstance(self.targets, str) or not set(self.targets) <= set(known):
                allowed = f"a list of {', '.join(known)}" if ahead_of_time else "empty: it builds for the GPU here"
                raise InvalidInputError(f"targets is {self.targets!r}; for {trt.__name__} it must be {allowed}.")
            config.num_compute_capabilities = len(self.targets)
            for index, name in enumerate(self.targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def target_names(trt: Any) -> list[str]:
    """The architectures that the package builds for ahead of time; none for TensorRT itself."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return [name for name in members if name.startswith("SM")]
