"""Store: prefixes by name. The layout and its reasons are in the package's docstring."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch

from foreword.errors import NoSuchPrefixError, PrefixFileError, SettingsError, StoreError
from foreword.prefix import Prefix
from foreword.store.files import SIGN, TRIES, open_files
from foreword.store.index import SECOND, WINDOW, Changes, Index, Page, Token, home
from foreword.store.names import (
    EPOCH,
    MICROSECOND,
    Folder,
    Mark,
    Version,
    check_name,
    key_of,
)
from foreword.store.verify import Problem, left_by_deletion, left_by_writes, verify

if TYPE_CHECKING:
    from foreword.bases import Base

LAYOUT = 1


class Store:
    """Prefixes by name. Threads and processes may share one, on any number of machines.

    Args:
        url: a folder, or a URL that fsspec knows (`s3://bucket/folder`, `memory://folder`).
        create: make a store there if there is none. Default: raise.
        options: for fsspec's filesystem, such as credentials.
        clock: seconds since 1970, UTC.

    Raises:
        StoreError: no store there, one of a later layout, or a URL that fsspec cannot open.
    """

    def __init__(
        self,
        url: str | PathLike[str],
        *,
        create: bool = False,
        options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.url = fspath(url)
        if not self.url:
            raise StoreError("expected a folder or a URL of a store; got an empty one")
        self._files = open_files(self.url, options or {})
        self._clock = clock
        self._index = Index(self._files, self._now)
        try:
            layout = json.loads(self._files.read(SIGN))["layout"]
        except FileNotFoundError:
            if not create:
                raise StoreError(
                    f"expected a store at {self.url}; there is none: check the path, or make one with "
                    "foreword train-many or foreword store put"
                ) from None
            layout = LAYOUT
            self._files.write(SIGN, json.dumps({"layout": LAYOUT}).encode())
        except (NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
            raise StoreError(f"expected a store at {self.url}; it is something else: name another folder") from None
        if layout != LAYOUT:
            raise StoreError(
                f"expected a store of layout {LAYOUT}; {self.url} has {str(layout)[:20]}: upgrade foreword"
            )

    def _now(self) -> int:
        return int(self._clock() * SECOND)

    def _next(self, folder: Folder, sha256: str) -> Mark:
        seen = folder.marks[-1].stamp if folder.marks else 0
        return Mark(max(self._now(), seen + 1), secrets.token_hex(4), sha256)

    def put(self, name: str, prefix: Prefix | bytes, *, dtype: torch.dtype = torch.bfloat16) -> Version:
        """Store a new version of a name.

        Args:
            name: see `check_name`.
            prefix: a prefix, or the bytes of a prefix file, which are kept as they are.
            dtype: of the stored tensors, where a `Prefix` is given.

        Returns:
            the version, the newest when it was written.

        Raises:
            PrefixFileError: the bytes are no prefix file.
            SettingsError: it is neither a prefix nor bytes.
            StoreError: the name cannot be used.
        """
        name, key = check_name(name), key_of(name)
        if not isinstance(prefix, Prefix | bytes | bytearray | memoryview):
            raise SettingsError(
                f"expected a prefix, or the bytes of its file; got {type(prefix).__name__}: give Prefix.load(path)"
            )
        if isinstance(prefix, Prefix):
            data = prefix.to_bytes(dtype)
        else:
            data = bytes(prefix)
            Prefix.from_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        for _ in range(TRIES):
            folder = self._index.look(key)
            mark = self._next(folder, sha256)
            announced = self._index.announce(key, mark)
            # also where it is damaged, which `verify` sees
            if not folder.named or self._index.name(key) is None:
                self._write_name(key, name)
            self._files.write(f"{home(key)}/{mark.file}", data)
            folder = self._index.look(key)
            if folder.tombstone and folder.tombstone > mark:
                # of a deletion that ran meanwhile: this one comes after it
                self._files.remove(f"{home(key)}/{mark.file}")
                continue
            if not folder.named:
                self._write_name(key, name)
            self._index.announce_late(key, mark, announced)
            return mark.of(name)
        raise StoreError(
            f"{name!r} was deleted {TRIES} times while it was put: stop what deletes it, then put it again"
        )

    def _write_name(self, key: str, name: str) -> None:
        self._files.write(f"{home(key)}/name.txt", name.encode())

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the newest first. Empty where there is no such name."""
        name = check_name(name)
        found = [mark.of(name) for mark in reversed(self._index.look(key_of(name)).alive)]
        if not found:
            self._files.check()
        return found

    def newest(self, name: str) -> Version:
        """The newest version of a name. Raises `NoSuchPrefixError` where there is no such name."""
        return self.find(name, None)

    def find(self, name: str, version: Version | str | None = None) -> Version:
        """One version of a name.

        Args:
            name: see `check_name`.
            version: one of `versions`, or the first digits of its sha256. Default: the newest.

        Raises:
            NoSuchPrefixError: no such name or version.
        """
        name = check_name(name)
        versions = self.versions(name)
        if not versions:
            raise self._missing(name)
        if version is None:
            return versions[0]
        if isinstance(version, Version):
            found = [one for one in versions if one == version]
        else:
            found = [one for one in versions if version and one.sha256.startswith(version.lower())]
        shorts = ", ".join(dict.fromkeys(one.sha256[:12] for one in found or versions))[:200]
        asked = repr(version[:64]) if isinstance(version, str) else version.sha256[:12]
        if not found:
            raise NoSuchPrefixError(f"no version {asked} of {name!r}: there are {shorts}")
        if len({one.sha256 for one in found}) > 1:
            raise NoSuchPrefixError(f"{asked} begins several versions of {name!r}: give more digits of one of {shorts}")
        return found[0]

    def _missing(self, name: str) -> NoSuchPrefixError:
        return NoSuchPrefixError(f"no prefix named {name!r} in {self.url}: check the name, or put it first")

    def read(self, version: Version) -> bytes:
        """The bytes of one version, their hash verified. One read, no listing.

        Raises:
            NoSuchPrefixError: it has been deleted.
            PrefixFileError: the bytes are not those that were put.
        """
        return self._read(key_of(version.name), Mark(version.stamp, version.id, version.sha256), version.name)

    def _read(self, key: str, mark: Mark, name: str) -> bytes:
        version = mark.of(name)
        try:
            data = self._files.read(f"{home(key)}/{mark.file}")
        except FileNotFoundError:
            raise NoSuchPrefixError(f"{version} is not in the store any more: ask for the newest") from None
        if hashlib.sha256(data).hexdigest() != mark.sha256:
            raise PrefixFileError(
                f"{version} is damaged, its hash is another: roll back to an older one, or put it again"
            )
        return data

    def get(self, name: str, version: Version | str | None = None, *, base: Base | None = None) -> Prefix:
        """A prefix, its hash verified and its content checked.

        Args:
            name: see `check_name`.
            version: one of `versions`, or the first digits of its sha256. Default: the newest.
            base: where given, the prefix is checked against it.

        Raises:
            NoSuchPrefixError: no such name or version.
            PrefixFileError: the object is damaged.
            WrongBaseError: the prefix is of another base.
        """
        try:
            if isinstance(version, Version) and version.name == check_name(name):
                data = self.read(version)
            else:
                data = self.read(self.find(name, version))
        except NoSuchPrefixError:
            if version is not None:
                raise
            # deleted and put again since the listing, perhaps
            data = self.read(self.find(name, None))
        prefix = Prefix.from_bytes(data)
        return prefix if base is None else prefix.check(base)

    def roll_back(self, name: str, version: Version | str) -> Version:
        """Make an older version the newest again, by putting its bytes once more. History stays.

        Args:
            name: see `check_name`.
            version: one of `versions`, or the first digits of its sha256.

        Raises:
            NoSuchPrefixError: no such name or version.
            PrefixFileError: that version is damaged.
        """
        return self.put(name, self.read(self.find(name, version)))

    def delete(self, name: str) -> int:
        """Delete every version of a name, and what interrupted writes left of it.

        A put that ends meanwhile comes before this or after it. The text of the name stays in the index until the next
        `rebuild`. A deletion that was interrupted may be repeated.

        Returns:
            how many versions there were.

        Raises:
            NoSuchPrefixError: there was nothing.
        """
        name, key = check_name(name), key_of(name)
        folder = self._index.look(key)
        if not (folder.alive or folder.left_of(folder.tombstone)):
            self._files.check()
            raise self._missing(name)
        tombstone = self._next(folder, "")
        announced = self._index.announce(key, tombstone)
        self._files.write(f"{home(key)}/{tombstone.file}", b"")
        self._index.announce_late(key, tombstone, announced)
        self._clear(key, tombstone, name)
        return len(folder.alive)

    def _clear(self, key: str, tombstone: Mark, name: str | None) -> None:
        """Remove the versions from before a deletion. A put that ends meanwhile removes its own, or comes after."""
        for file in self._index.look(key).left_of(tombstone):
            self._files.remove_all(f"{home(key)}/{file}")
        # a put that saw the tombstone may have counted on the name
        folder = self._index.look(key)
        if folder.alive and not folder.named and name:
            self._write_name(key, name)

    def page(self, after: str = "", limit: int = 100, *, begins: str = "") -> Page:
        """The newest versions of up to `limit` names, sorted by name.

        A name that is there from the first page to the last comes exactly once, whatever is written meanwhile. The first
        call reads the index, later ones what has changed.

        Args:
            after: begin after this name: the `cursor` of the page before. Default: at the beginning.
            limit: at most this many names, 1 or more.
            begins: only names that begin so.
        """
        if limit < 1:
            raise SettingsError(f"expected a page of 1 name or more; got limit={limit}")
        page = self._index.page(unicodedata.normalize("NFC", after), limit, unicodedata.normalize("NFC", begins))
        if not page.versions:
            self._files.check()
        return page

    def changes(self, since: Token | datetime | None = None) -> Changes:
        """What changed since an earlier call. Costs a few listings, at any number of names.

        Args:
            since: the `token` of the call before, which makes every change come once; or a time by the writers' clocks,
                a naive one being local. Default: everything there is. Announcements are kept for a week (see `rebuild`):
                where they no longer reach back to `since`, everything is returned and `reset` is set.
        """
        if isinstance(since, datetime):
            since = Token(time=(since.astimezone(EPOCH.tzinfo) - EPOCH) // MICROSECOND + WINDOW)
        return self._index.changes(since)

    def rebuild(self) -> int:
        """Make the index anew from the files, and clear away what is no longer needed.

        That is: what interrupted writes and deletions left an hour ago or more, the index before, and announcements and
        tombstones older than a week. Run it from time to time: it makes a process's first listing fast, and takes
        deleted names out of the index. Others may read and write meanwhile.

        Returns:
            how many names there are.
        """
        return self._index.rebuild(self._tidy)

    def _tidy(self, key: str, folder: Folder, name: str | None, horizon: int) -> None:
        now = self._now()
        for path in left_by_writes(self._files, key, folder, now):
            self._files.remove(path)
        if folder.tombstone and left_by_deletion(key, folder, now):
            self._clear(key, folder.tombstone, name)
        if folder.tombstone and folder.tombstone.stamp < horizon:
            self._files.remove(f"{home(key)}/{folder.tombstone.file}")
            self._files.remove_empty(home(key))

    def verify(self) -> Iterator[Problem]:
        """Read everything there is, and yield what is wrong with it. Changes nothing.

        Others may write meanwhile: what changed under way is looked at again before it is called wrong.
        """
        self._files.check()
        return verify(self._files, self._index, self._now, lambda *one: Prefix.from_bytes(self._read(*one)))
