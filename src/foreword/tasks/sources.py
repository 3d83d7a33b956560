"""Where records come from: a file, a folder of files, or a data set of the hub. Everything arrives as rows.

Whatever is wrong with a source is a `DataError` of one line that names the file and the line, entry or row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from foreword.data import record_of, table_rows
from foreword.errors import DataError, MissingExtraError, SettingsError, one_line
from foreword.reading import text_of

__all__ = [
    "Formats",
    "Row",
    "Source",
    "at",
    "csv_rows",
    "files_of",
    "json_rows",
    "jsonl_rows",
    "lines",
    "read_rows",
    "xml_root",
]

HUB = "hub:"

Source = str | os.PathLike[str]


class Row(NamedTuple):
    """One record as it came: where it stands (for errors), a short name for it, and its columns."""

    where: str
    id: str
    fields: Mapping[str, Any]


Formats = Mapping[str, Callable[[Path], Iterator[Row]]]
"""How files are read, by suffix. A folder is read in the first format of which it holds files."""


@contextmanager
def at(where: object) -> Iterator[None]:
    """Put the place in front of a `DataError`'s message."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def read_rows(source: Source, formats: Formats, *, split: str | None, config: str | None) -> Iterator[Row]:
    """Every row of a source.

    Args:
        source, split, config: as `foreword.tasks.read` takes them.
        formats: see `Formats`.

    Raises:
        DataError: there is no such source, it cannot be read, or it holds several splits and none was named.
        SettingsError: `split` or `config` where they mean nothing.
        MissingExtraError: a data set of the hub, without the package `datasets`.
    """
    if str(source).startswith(HUB):
        yield from _hub_rows(str(source), split, config)
        return
    if config is not None:
        raise SettingsError(f"config={config!r} is for data sets of the hub ({HUB}NAME); {source} is not one")
    for path in files_of(source, formats, split):
        yield from formats[path.suffix.lower()](path)


def files_of(source: Source, formats: Formats, split: str | None) -> list[Path]:
    """The files that `read_rows` reads; none of a data set of the hub."""
    if str(source).startswith(HUB):
        return []
    source = Path(source)
    endings = " or ".join(formats)
    if source.is_file():
        if split is not None:
            raise SettingsError(f"split={split!r} is for folders and data sets of the hub; {source} is a file")
        if source.suffix.lower() not in formats:
            raise DataError(f"{source}: expected a file ending in {endings}")
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder (a data set of the hub is named {HUB}NAME)")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for suffix in formats:
        if found := [path for path in files if path.suffix.lower() == suffix]:
            return _of_split(source, found, split)
    raise DataError(f"{source}: expected files ending in {endings}; the folder holds none")


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_in(path.relative_to(folder).as_posix()), []).append(path)
    names = ", ".join(sorted(name for name in by_split if name)) or "none"
    if split is not None:
        wanted = _split_in(split)
        if wanted is None or wanted not in by_split:
            raise DataError(f"{folder}: expected files of the split {split!r}; the folder's splits: {names}")
        return by_split[wanted]
    if len(by_split) > 1:
        raise DataError(f"{folder}: holds files of several splits ({names}): say which split, or name a file")
    return files


def _split_in(name: str) -> str | None:
    found = re.search(r"(?:^|[^a-z])(train|dev|val|test)", name.lower())
    return None if found is None else {"val": "dev"}.get(found[1], found[1])


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = text_of(raw, f"{path}:{number}").strip("\r\n")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if number == 0:
        raise DataError(f"{path}: the file is empty")


def _text(path: Path) -> str:
    try:
        text = text_of(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV file with a header."""
    for number, fields in table_rows(path, _text(path), ","):
        yield Row(f"{path}:{number}", f"{path.stem}:{number}", fields)


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The rows of a file with one JSON object a line."""
    for number, line in lines(path):
        where = f"{path}:{number}"
        yield Row(where, f"{path.stem}:{number}", record_of(line, where))


def json_rows(path: Path) -> Iterator[Row]:
    """The entries of a file that is one JSON list of objects."""
    entries = _parsed(_text(path), path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a JSON list of entries; got {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        yield Row(where, f"{path.stem}:{number}", _object(entry, where))


def _parsed(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON ({error})") from None


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object; got {type(value).__name__}")
    return value


def xml_root(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    A document type is refused: the field's files have none, and entities that expand without end live there.
    """
    text = _text(path)
    if "<!DOCTYPE" in text:
        raise DataError(f"{path}: expected XML without a document type (<!DOCTYPE ...>): take it out")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: expected XML ({error})") from None


def _hub_rows(source: str, split: str | None, config: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("data", "datasets") from None
    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision or None)
    except Exception as error:  # its own, and those of HTTP, of the disk and of every file format
        raise DataError(f"{source}: cannot be loaded ({type(error).__name__}: {one_line(error)})") from None
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise DataError(f"{source}: holds several splits ({', '.join(data)}): say which split")
        (data,) = data.values()
    for number, fields in enumerate(data, 1):
        yield Row(f"{source}: row {number}", f"row:{number}", fields)
