"""Files that are whole or not there: written aside, flushed and renamed; the checksums of those that were."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from lora_lightning.adapters.distributed import META
from lora_lightning.adapters.written import distributed, failing_together, first_process_writes, unwritten
from lora_lightning.errors import AdapterError

MANIFEST = "checksums.json"  # of a checkpoint that is a folder; written last, so without it the folder is unfinished
REPLACED = ".replaced"  # what a folder that is being replaced is called for a moment
_OF_CHECKPOINTS = (MANIFEST, META, ".metadata", "latest")  # ours, Lightning's, torch's, DeepSpeed's
_MARK = ".tmp-lora-"
_TEMPORARY = re.compile(r"\..+\.tmp-lora-\w+")
_SEAL = b"lora-lightning crc32 "  # and eight digits: the comment at the end of a zip archive that we wrote
_CHUNK = 1 << 20
_STARTED = time.time()


def atomic_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a path that afterwards holds the old file whole or the new one whole, whatever happens.

    The tensors go straight into the file, not through a second copy in memory.

    Args:
        obj: What ``torch.save`` takes.
        path: A local file; its folder is made.

    Raises:
        AdapterError: If it cannot be written, or the path is a folder that holds no checkpoint. What was there before
            is as it was, and no part of the new file is left.
    """
    path = Path(path)
    _refuse_other_folder(path)
    temporary = path.with_name(f".{path.name}{_MARK}{os.getpid()}_{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save_flushed(obj, temporary)
        _put(temporary, path)
    except OSError as error:
        raise unwritten(path, error, obj) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write a checkpoint into that takes its place whole, or not at all. Every process enters it.

    Processes of a torch process group write into one folder. Once all have left, the first one writes each file's
    size and checksum into ``checksums.json``, flushes everything and renames. An exception in any of the processes
    becomes one in all of them, so that none waits for another that is gone.

    Args:
        path: The folder, the same on every process; what is there already is replaced.

    Yields:
        Where to write: a folder beside it.

    Raises:
        AdapterError: If it cannot be written, on every process, or something else than a checkpoint is there. What was
            there before is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{_MARK}folder")
    first = not distributed() or dist.get_rank() == 0

    def prepare() -> None:
        _refuse_other_folder(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        _write_manifest(temporary)
        _put(temporary, path)

    try:
        first_process_writes(path, prepare)
        with failing_together(path):
            yield temporary
        first_process_writes(path, finish)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder and see that a file can be put into it; call it on every process.

    Raises:
        AdapterError: If not, on every process.
    """
    trial = Path(folder) / f".trial{_MARK}{os.getpid()}_{secrets.token_hex(4)}"

    def write() -> None:
        trial.parent.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(b"adapter")
        finally:
            trial.unlink(missing_ok=True)

    first_process_writes(folder, write)


def damage_of(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one: every byte is read and its checksum compared.

    Args:
        path: A file that :func:`atomic_save` wrote, or another of ``torch.save``'s (a zip archive, whose members'
            checksums torch itself does not look at), or a folder that :func:`atomic_folder` made.
    """
    path = Path(path)
    if path.is_dir():
        return _damage_of_folder(path)
    if not path.exists():
        return "it is a link to nothing" if path.is_symlink() else "there is no such file"
    try:
        if (sealed := _sealed(path)) is not None:
            return None if sealed else "its checksum is wrong"
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except Exception as error:  # zipfile raises many kinds for what is cut off or damaged
        return f"it is cut off or damaged ({error})"
    return None if member is None else f"the checksum of {member} in it is wrong"


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove temporary files that killed processes left in a folder: ours by name, and older than this process.

    Returns:
        What was removed.
    """
    removed = []
    for path in Path(folder).glob(f".*{_MARK}*"):
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime < _STARTED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


# ---- writing


class _Watched(io.RawIOBase):
    """Passes writes on, sums them up, and keeps the system's error, which torch's writer may hide behind its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save_flushed(obj: Any, path: Path) -> None:
    with open(path, "xb") as file:
        watched = _Watched(file)
        try:
            torch.save(obj, watched)  # type: ignore[arg-type]  # it asks for write and flush only
        except RuntimeError as error:
            raise watched.error or error from error
        # An archive ends in the length of its comment, none so far, and the comment.
        comment = _SEAL + b"%08x" % watched.crc32
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(comment)) + comment)
        file.flush()
        os.fsync(file.fileno())


def _sealed(path: Path) -> bool | None:
    """Whether the checksum of the whole file is right; None for one without, which others wrote."""
    length = len(_SEAL) + 8
    with open(path, "rb") as file:
        rest = file.seek(0, os.SEEK_END) - length - 2
        if rest < 0:
            return None
        file.seek(rest)
        end = file.read()
        if not end[2:].startswith(_SEAL):
            return False if _SEAL in end else None
        file.seek(0)
        value = 0
        while rest and (chunk := file.read(min(rest, _CHUNK))):
            value, rest = zlib.crc32(chunk, value), rest - len(chunk)
    return end == struct.pack("<H", length) + _SEAL + b"%08x" % zlib.crc32(bytes(2), value)


def _refuse_other_folder(path: Path) -> None:
    """A checkpoint takes the place of a checkpoint, of an empty folder too, and not of what somebody keeps there."""
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in _OF_CHECKPOINTS):
        raise AdapterError(
            f"{path} is a folder that holds no checkpoint but other files, which would be lost: give the checkpoint a "
            "name of its own, in that folder or elsewhere"
        )


def _put(temporary: Path, path: Path) -> None:
    """Rename onto a path. A file is replaced in one step; a folder has to step aside first, which is done last."""
    aside = path.with_name(path.name + REPLACED)
    if path.is_dir() or (temporary.is_dir() and path.exists()):
        _remove(aside if damage_of(path) is None else path)  # a killed process may have left both: keep a whole one
        if path.exists():
            path.rename(aside)
    temporary.replace(path)
    _flush_folder(path.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Under a name that is no checkpoint's, since a folder may be left half removed.
        doomed = path.with_name(f".{path.name}{_MARK}{os.getpid()}_{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a renaming last through a power cut; where a folder cannot be opened or flushed, the system sees to it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- folders


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {}
    for path in files:
        content[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "crc32": _crc32(path, flush=True)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for place in {path.parent for path in files} | {folder}:
        _flush_folder(place)


def _damage_of_folder(folder: Path) -> str | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, told in content.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing in it"
            if path.stat().st_size != told["size"]:
                return f"{name} in it has {path.stat().st_size:,} bytes instead of {told['size']:,}"
            if _crc32(path) != told["crc32"]:
                return f"the checksum of {name} in it is wrong"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except Exception as error:  # a damaged manifest can be anything
        return f"its {MANIFEST} is damaged ({error})"
    return None


def _crc32(path: Path, *, flush: bool = False) -> int:
    value = 0
    with open(path, "r+b" if flush else "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
        if flush:
            os.fsync(file.fileno())
    return value
