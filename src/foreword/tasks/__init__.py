"""The field's data sets as records: inputs linearized as in the paper's code, with all their references."""

from __future__ import annotations

import os
from pathlib import Path

from foreword.errors import SettingsError
from foreword.tasks import dart, e2e, summarization, webnlg
from foreword.tasks.records import Example, Report, training_rows
from foreword.tasks.sources import Source, files_of
from foreword.writing import check_apart, check_file, write_jsonl

__all__ = ["TASKS", "Example", "Report", "files", "prepare", "read", "training_rows"]

TASKS = {"dart": dart, "e2e": e2e, "summarization": summarization, "webnlg": webnlg}
"""The readers, by the task's name."""


def read(
    task: str, source: Source, *, split: str | None = None, config: str | None = None
) -> tuple[list[Example], Report]:
    """Read a task's data.

    Args:
        task: a name in `TASKS`.
        source: a file; a folder, read with all its subfolders; or a data set of the hub: `hub:NAME`, or
            `hub:NAME@REVISION` (such as `@refs/convert/parquet`, where the data set itself is a script).
        split: train, dev or test: which files of a folder, by their names; or a split as the hub names it.
            Needed only where there are several.
        config: the configuration of a data set of the hub.

    Returns:
        The examples in the order of the source, and what was kept and dropped.

    Raises:
        DataError: the source cannot be read or holds something else; the message names the file and the line.
        SettingsError: an unknown task, or `split` or `config` where they mean nothing.
        MissingExtraError: a data set of the hub, without the package `datasets`.
    """
    _check(task)
    return TASKS[task].read(source, split=split, config=config)


def files(task: str, source: Source, *, split: str | None = None) -> list[Path]:
    """The files that `read` reads, over which nothing may be written; none of a data set of the hub.

    Raises:
        DataError, SettingsError: as `read` does, of the source as a whole.
    """
    _check(task)
    return files_of(source, TASKS[task].FORMATS, split)


def _check(task: str) -> None:
    if task not in TASKS:
        raise SettingsError(f"expected a task of {', '.join(TASKS)}; got {task!r}")


def prepare(
    task: str,
    source: Source,
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    config: str | None = None,
) -> Report:
    """Read a task's data and write it as JSONL: a row for each reference, with the example's "id".

    The file is for training. Every reader takes it in place of its source, and groups the references again.

    Args:
        task, source, split, config: as `read` takes them.
        out: the file to write, .jsonl. It is written aside and renamed, and replaces one that is there.

    Returns:
        What was kept and dropped.

    Raises:
        ForewordError: as `read` does, and where `out` is a folder or one of the files read.
    """
    out = Path(out)
    check_file(out)
    check_apart(out, *files(task, source, split=split))
    if out.suffix.lower() != ".jsonl":
        raise SettingsError(f"expected a name that ends in .jsonl, by which readers know what is in it; got {out}")
    examples, report = read(task, source, split=split, config=config)
    write_jsonl(out, ({"id": one.id, **row} for one in examples for row in training_rows([one])))
    return report
