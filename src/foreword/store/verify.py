"""What is wrong with a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from foreword.errors import NoSuchPrefixError, PrefixFileError
from foreword.store.files import Files
from foreword.store.index import SECOND, Index, home
from foreword.store.names import Folder, Mark

STALE = 3600 * SECOND
"""The time after which something half done was cut off, and is not under way."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong in a store.

    Args:
        path: of the file or folder, relative to the store.
        name: whose, where that is known.
        what: is wrong, and what to do, in one line.
    """

    path: str
    name: str | None
    what: str


def left_by_writes(files: Files, key: str, folder: Folder, now: int) -> list[str]:
    """The files of writes that were cut off, and others that are not the store's."""
    paths = [f"{home(key)}/{file}" for file in folder.strays]
    return [path for path in paths if files.modified(path) < now - STALE]


def left_by_deletion(key: str, folder: Folder, now: int) -> list[str]:
    """The files that a deletion would have removed, had it not been cut off."""
    if folder.tombstone is None or folder.tombstone.stamp >= now - STALE:
        return []
    return [f"{home(key)}/{file}" for file in folder.left_of(folder.tombstone) if file not in folder.strays]


def verify(
    files: Files, index: Index, now: Callable[[], int], check: Callable[[str, Mark, str], object]
) -> Iterator[Problem]:
    """See `Store.verify`; `check(key, mark, name)` reads one version and raises where it is damaged."""
    listed = {change.key: change.version for change in index.changes(None).items}
    suspects = set(listed)
    for key, folder, name in index.walk():
        for path in left_by_writes(files, key, folder, now()):
            yield Problem(path=path, name=name, what="left by a write that was cut off: rebuild, which clears it away")
        for path in left_by_deletion(key, folder, now()):
            yield Problem(path=path, name=name, what="left by a deletion that was cut off: rebuild, which ends it")
        if folder.alive and name is None and index.look(key).alive and index.name(key) is None:
            what = "the name is missing or another's, so it is not listed: put a prefix of that name again"
            yield Problem(path=f"{home(key)}/name.txt", name=None, what=what)
        for mark in folder.alive:
            try:
                check(key, mark, name or key)
            except NoSuchPrefixError:
                # deleted meanwhile
                continue
            except PrefixFileError as error:
                yield Problem(path=f"{home(key)}/{mark.file}", name=name, what=str(error))
        version = folder.newest(name)
        suspects.discard(key)
        if version != listed.get(key):
            suspects.add(key)
    yield from _verify_index(index, suspects)


def _verify_index(index: Index, suspects: set[str]) -> Iterator[Problem]:
    def look(key: str) -> tuple[Folder, str | None]:
        return index.look(key), index.name(key)

    before = {key: folder.newest(name) for key in suspects for folder, name in [look(key)]}
    listed = {change.key: change.version for change in index.changes(None).items}
    for key, version in before.items():
        folder, name = look(key)
        found = listed.get(key)
        if found != version == folder.newest(name):
            what = "the index says otherwise than the files: rebuild it"
            yield Problem(path=home(key), name=name or (found.name if found else None), what=what)
    gone = (index.snapshot() or (0, {}))[1].keys() - listed.keys()
    if gone:
        what = f"the index still holds the names of {len(gone)} deleted prefixes: rebuild it"
        yield Problem(path="index", name=None, what=what)
