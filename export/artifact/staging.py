"""A folder that appears whole or not at all: written aside, moved into place when everything in it is right."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdsurgery.errors import ArtifactError


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` on success and vanishes on any error.

    Raises:
        ArtifactError: `target` exists already, its parent does not, or a file cannot be written: the disk is full.
    """
    place = Path(target).absolute()
    if place.exists() or place.is_symlink():
        raise ArtifactError(f"{target} exists already. Give a folder that does not exist; nothing is overwritten.")
    with workplace(target) as aside:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes it private
        os.replace(aside, place)


@contextmanager
def workplace(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` and remove what is left of it.

    Raises:
        ArtifactError: the parent of `target` does not exist, or a file cannot be written: the disk is full.
    """
    place = Path(target).absolute()
    if not place.parent.is_dir():
        raise ArtifactError(f"The folder {place.parent}, in which {place.name} was to be made, does not exist.")
    # Beside the target, because only a rename within one file system is atomic.
    aside = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield aside
    except Exception as error:
        # Libraries in Rust (tokenizers, safetensors) raise their own kinds and print the system's error at the end.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        free = shutil.disk_usage(place.parent).free
        raise ArtifactError(
            f"{target} could not be written, and nothing of it was kept: {error}. {free:,} bytes are free in "
            f"{place.parent}; make room there, or give a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
