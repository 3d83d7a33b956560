"""A file of many users' rows, far more than memory need hold."""

from __future__ import annotations

import unicodedata
from array import array
from os import PathLike
from pathlib import Path

from foreword.data import Record, column_names, record_of, renamed
from foreword.errors import DataError
from foreword.reading import text_of

__all__ = ["UserFile"]


class UserFile:
    """A JSONL file of many users' rows, of which only the places of each user's lines are held in memory.

    Users are told apart as the store tells names apart: in Unicode's form NFC.

    Args:
        path: the file, UTF-8. A user's lines need not stand together.
        by: the column that names the user.
        input, output: the columns that hold x and y.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: one column is to be both x and y.
        DataError: the file is empty, a line is no JSON object, or names no user.
    """

    def __init__(self, path: str | PathLike[str], by: str = "user", *, input: str = "input", output: str = "output"):
        self.path, self.by = Path(path), by
        self._names = column_names(input, output)
        self._places: dict[str, array[int]] = {}
        if self.path.exists() and not self.path.is_file():
            raise DataError(
                f"{self.path}: expected a file that can be read again; got a folder or a pipe: write it to a file"
            )
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                text = text_of(line, where)
                if text.strip():
                    user = self._user_of(record_of(text, where), where)
                    if user not in self._places:
                        self._places[user] = array("Q")
                    self._places[user].append(place)
                place += len(line)
        if not self._places:
            raise DataError(f"{self.path}: expected at least one record; the file has none")

    def _user_of(self, record: Record, where: str) -> str:
        user = record.get(self.by)
        if not isinstance(user, str) or not user:
            came = "no such column" if self.by not in record else ascii(user)[:80]
            came += ": write it as text" if isinstance(user, int) else ""
            raise DataError(f"{where}: expected a user's name in the column {self.by!r}; got {came}")
        return unicodedata.normalize("NFC", user)

    @property
    def users(self) -> list[str]:
        """Every user, in the order of their first lines."""
        return list(self._places)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def rows(self, user: str) -> int:
        """How many rows a user has."""
        return len(self._places.get(user, ()))

    def records(self, user: str) -> list[Record]:
        """A user's records, read from the disk now.

        Raises:
            DataError: a record lacks a column that was named; or the file is no longer the one that was looked through.
        """
        records: list[Record] = []
        with self.path.open("rb") as file:
            for number, place in enumerate(self._places.get(user, ()), 1):
                file.seek(place)
                where = f"{self.path}, record {number} of {user!a}"
                # it was read before; and nobody's rows may get into another's prefix
                try:
                    record = record_of(text_of(file.readline(), where), where)
                    changed = self._user_of(record, where) != user
                except DataError:
                    changed = True
                if changed:
                    raise DataError(f"{self.path}: the file was changed while it was read: run this again")
                records.append(renamed(record, self._names, where))
        return records
