"""Files as everything here writes them: whole or not at all, and over nothing that somebody would miss."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foreword.errors import SettingsError

__all__ = ["check_apart", "check_file", "check_new", "remove_asides", "write_atomically", "write_jsonl"]


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise `SettingsError` where a path is a folder, or a device such as /dev/null, which a rename would replace."""
    # looked at once: it may go between two looks
    mode = stat.S_IFREG
    with suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise SettingsError(f"expected a file to write to; {path} is a folder or a device: name another path")


def check_new(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """See before any work whether a file may be written, and can.

    Raises:
        SettingsError: `path` is no file, or one that is there and would be lost; or nothing can be written there.
    """
    check_file(path)
    if os.path.exists(path) and not overwrite:
        raise SettingsError(f"{path} is there already: choose another name, or give --overwrite")
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SettingsError(
            f"expected a folder to write to; {folder} is none ({error.strerror}): choose another"
        ) from None


def check_apart(path: Path, *read: Path | None) -> None:
    """Raise `SettingsError` where what is to be written would take the place of what is read."""
    for one in read:
        if one is not None and path.exists() and path.samefile(one):
            raise SettingsError(f"expected another file to write to than {one}, which would be lost")


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it is flushed to disk and renamed over `path`.

    Of a link, the file that it leads to is written, and the link stays. On any error the file aside is removed and `path`
    is as it was.

    Raises:
        SettingsError: `path` is a folder or a device.
        OSError: it cannot be written there.
    """
    check_file(path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{_aside(path)}{secrets.token_hex(6)}.part")
    aside.touch(exist_ok=False)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _aside(path: Path) -> str:
    # names may begin alike, and be too long for more to be put after them
    return f".{path.name[:40]}.{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}."


def remove_asides(path: str | os.PathLike[str]) -> None:
    """Remove what writers of `path` that were killed have left; for a file that nobody else writes at the time."""
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f"{glob.escape(_aside(path))}{'?' * 12}.part"):
        left.unlink(missing_ok=True)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines atomically; half a surrogate pair, which JSON can hold and UTF-8 can't, is written as
    JSON does.
    """
    with write_atomically(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
