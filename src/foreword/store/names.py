"""Names, versions, and what the files of one name say."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from foreword.errors import StoreError

MAX_NAME = 256
"""Characters of a name, in NFC."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

_UNUSABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MARK = re.compile(r"(\d{16})-([0-9a-f]{8})-(?:([0-9a-f]{64})\.safetensors|deleted)", re.ASCII)


def check_name(name: str) -> str:
    """Return the name in NFC.

    Raises:
        StoreError: it is empty, longer than 256 characters, or holds control characters or half a surrogate pair.
    """
    if not isinstance(name, str):
        raise StoreError(f"expected a name of a prefix, a string; got {type(name).__name__}")
    # composing makes four characters one at most, and takes its time
    if len(name) <= 4 * MAX_NAME:
        name = unicodedata.normalize("NFC", name)
    if not 1 <= len(name) <= MAX_NAME:
        raise StoreError(f"expected a name of 1 to {MAX_NAME} characters; got {len(name)}: choose another name")
    if odd := _UNUSABLE.search(name):
        raise StoreError(
            f"expected a name that is one line of text; {name[:40]!a} holds U+{ord(odd[0]):04X}: "
            "choose a name without control characters"
        )
    return name


def key_of(name: str) -> str:
    """What stands for a name in paths and in `Change`: 40 hex digits of the sha256 of its NFC, in UTF-8."""
    return hash_of(check_name(name))


def hash_of(name: str) -> str:
    """The key of a name that is known to be one."""
    return hashlib.sha256(name.encode()).hexdigest()[:40]


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One version of one name.

    Args:
        name: in NFC.
        stamp: when it was put, in microseconds since 1970, UTC; later than the versions that its writer saw.
        id: random; orders two versions of one stamp.
        sha256: of the file's bytes.
    """

    name: str
    stamp: int
    id: str
    sha256: str

    @property
    def time(self) -> datetime:
        return EPOCH + self.stamp * MICROSECOND

    def __str__(self) -> str:
        return f"version {self.sha256[:12]} of {self.name!r}"


class Mark(NamedTuple):
    """A version's object, or a tombstone, whose `sha256` is empty. The greatest is the newest."""

    stamp: int
    id: str
    sha256: str

    def of(self, name: str) -> Version:
        return Version(name=name, **self._asdict())

    @property
    def checked(self) -> Mark:
        """Itself. Raises `ValueError` where it is no version's that `file` could name."""
        if type(self.stamp) is not int or not self.sha256 or not _MARK.fullmatch(self.file):
            raise ValueError(f"no version's mark: {self}")
        return self

    @property
    def file(self) -> str:
        # sixteen digits, so that they sort as text
        return f"{self.stamp:016d}-{self.id}-" + (f"{self.sha256}.safetensors" if self.sha256 else "deleted")


class Folder:
    """What the files of one name say.

    Args:
        files: the names of the files in its folder.
    """

    def __init__(self, files: Iterable[str]):
        self.marks: list[Mark] = []
        self.strays: list[str] = []
        self.named = False
        for file in files:
            if match := _MARK.fullmatch(file):
                self.marks.append(Mark(int(match[1]), match[2], match[3] or ""))
            elif file == "name.txt":
                self.named = True
            else:
                self.strays.append(file)
        self.marks.sort()
        start = max((i + 1 for i, mark in enumerate(self.marks) if not mark.sha256), default=0)
        self.alive = self.marks[start:]
        """The versions since the last tombstone, the oldest first."""
        self.tombstone = self.marks[start - 1] if start else None

    def newest(self, name: str | None) -> Version | None:
        """None where there is no version, or the name is not known."""
        return self.alive[-1].of(name) if self.alive and name is not None else None

    def left_of(self, tombstone: Mark | None) -> list[str]:
        """The files that a deletion clears away; not the name, where a newer version lives."""
        older = [mark.file for mark in self.marks if tombstone and mark < tombstone]
        return older + self.strays + (["name.txt"] if self.named and not self.alive else [])
