"""The store: prefixes by name, in a folder or on any filesystem fsspec can write to (S3, GCS, memory://).

    ROOT/
      foreword-store.json                 says what this folder is
      names/AB/KEY/                       KEY: the first 40 hex digits of the sha256 of the name, AB its first two
        name.txt                          the name
        TIME-ID-SHA256.safetensors        one version: the very bytes that were put, never written over
        TIME-ID-deleted                   a tombstone: everything older is deleted
      changes/DAY/HHMM/TIME-KEY-TIME-ID   an announcement, empty: this name is about to change
      index/TIME-TIME-ID.json             every name and its newest version, as of the first TIME

A **name** is any text of 1 to 256 characters without control characters. It never becomes a path: its hash does, so no
name escapes, "CON" and "a/b" are ordinary, and "Bob" is not "bob" on any system. Names are compared in Unicode's form
NFC: é typed as one character or as two is one name.

A **version** is one object, written whole, and its name says its content's hash. The greatest (TIME, ID) is the newest;
a writer takes a TIME above all it sees in the folder, so clocks need not agree, and two writers at once leave two
versions. No object is written over and no file is shared by two writers, so nothing takes a lock, and a crash leaves
the old state or the new one. Objects belong to one name: two names with the same content have a copy each. To get one
costs a listing of one small folder and one read, however many names there are.

**Deleting** writes a tombstone, from which moment the name is gone, and then clears away what is older. The tombstone
stays for a week, so that a writer whose clock is behind takes a TIME above it.

**Changes** are announced before they are made: who reads an announcement looks into the name's folder, and looks again
until the change is there, so no crash makes a change that nobody hears of. Announcements lie in folders of a minute; a
poll lists the last few, and costs the same at any number of names. They hold hashes, not names.

The **index** is a snapshot and the announcements since. Only listing uses it; `Store.rebuild` makes it anew from the
files.

On a local disk, objects are written aside, flushed and renamed. Elsewhere one `pipe_file` writes them: object stores
show an object whole or not at all; where a filesystem does not, a reader sees the hash fail and may try again.

    store.py    Store: what others call
    names.py    names, versions, and what the files of one name say
    files.py    a folder or an fsspec filesystem, as the store uses it
    index.py    announcements, snapshots, changes, pages
    verify.py   what is wrong with a store
"""

from foreword.store.index import Change, Changes, Page, Token
from foreword.store.names import Version, check_name, key_of
from foreword.store.store import Store
from foreword.store.verify import Problem

__all__ = [
    "Change",
    "Changes",
    "Page",
    "Problem",
    "Store",
    "Token",
    "Version",
    "check_name",
    "key_of",
]
