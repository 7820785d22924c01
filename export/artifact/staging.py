"""A folder that appears whole or not at all: written aside, moved into place when everything in it is right."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdsurgery.errors import ArtifactError

# No space, none left of a quota, or larger than the file system takes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What `ndarray.tofile` says when it could not write all, without a number:
# https://github.com/numpy/numpy/blob/v2.3.0/numpy/_core/src/multiarray/convert.c
_NUMPY = re.compile(r"\d+ requested and \d+ written|problem writing element")


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` on success and vanishes on any error.

    Raises:
        ArtifactError: `target` exists already, its parent does not, or a file cannot be written or read.
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
        ArtifactError: the parent of `target` does not exist, or a file cannot be written or read.
    """
    place = Path(target).absolute()
    if not place.parent.is_dir():
        raise ArtifactError(f"The folder {place.parent}, in which {place.name} was to be made, does not exist.")
    # Beside the target, because only a rename within one file system is atomic.
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise ArtifactError(_failure(target, place.parent, error)) from error
    try:
        yield aside
    except Exception as error:
        if not isinstance(error, OSError) and _number(error) is None:
            raise
        raise ArtifactError(_failure(target, place.parent, error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_file(source: Path, folder: Path, name: str) -> None:
    """Copy a file of one folder to the same place in another; the name may lead through folders, with "/"."""
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, place)


def _failure(target: str | os.PathLike[str], parent: Path, error: Exception) -> str:
    said = f"{target} could not be written, and nothing of it was kept: {error}."
    if _number(error) not in _FULL and not _NUMPY.search(str(error)):
        return said
    free = shutil.disk_usage(parent).free
    return f"{said} {free:,} bytes are free in {parent}; make room there, or give a folder on another disk."


def _number(error: Exception) -> int | None:
    """The system's number of an error; libraries in Rust (tokenizers, safetensors) print it at the end of their own."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)
