"""The E2E NLG challenge: descriptions of restaurants from meaning representations (Novikova et al. 2017).

Read from the challenge's CSV (columns `mr` and `ref`), from the lines of the paper's code
(`name : X | Type : Y||text`), from rows as `prepare` writes them, or from the hub (columns
`meaning_representation` and `human_reference`). The references of one meaning representation make one
example. The challenge's folder holds its test set twice, without references and with them: rows without are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from foreword.errors import DataError
from foreword.tasks.records import Collector, Example, Report, text_field
from foreword.tasks.sources import Formats, Row, Source, at, csv_rows, jsonl_rows, lines, read_rows

__all__ = ["FORMATS", "linearize", "read"]

NAMES = {"eatType": "Type", "familyFriendly": "family friendly", "priceRange": "price"}
"""The challenge's names of attributes, and those of the paper's files where they differ."""

ATTRIBUTE = re.compile(r"([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")


def read(source: Source, *, split: str | None = None, config: str | None = None) -> tuple[list[Example], Report]:
    """Read E2E data; see `foreword.tasks.read` for the arguments."""
    found = Collector()
    for row in read_rows(source, FORMATS, split=split, config=config):
        with at(row.where):
            if "input" in row.fields:
                found.add_prepared(row.fields, id=row.id)
            elif Path(source).is_dir() and not row.fields.keys() & {"ref", "human_reference"}:
                found.drop("row without a reference")
            else:
                input = linearize(text_field(row.fields, "mr", "meaning_representation"))
                reference = text_field(row.fields, "ref", "human_reference")
                found.add(input, [reference], id=row.id, key=input)
    return found.result(source)


def linearize(mr: str) -> str:
    """`name[Alimentum], area[city centre], familyFriendly[no]`, as the files of the paper's code have it:
    `name : Alimentum | area : city centre | family friendly : no`.

    The order of the attributes is kept. Amounts stand apart from their sign, as in those files: `£ 20 - 25`.

    Raises:
        DataError: `mr` is not a list of attributes with their values in brackets.
    """
    mr = mr.strip()
    pairs, end = [], 0
    while end < len(mr) and (found := ATTRIBUTE.match(mr, end)):
        name, value = map(str.strip, found.groups())
        if name == "priceRange":
            value = re.sub(r"(?<=\d)-(?=\d)", " - ", re.sub(r"£(?=\d)", "£ ", value))
        pairs.append(f"{NAMES.get(name, name)} : {value}")
        end = found.end()
    if end < len(mr) or not pairs:
        raise DataError(f"expected a meaning representation, name[The Mill], food[English]; got {mr[:100]!r}")
    return " | ".join(pairs)


def _line_rows(path: Path) -> Iterator[Row]:
    for number, line in lines(path):
        where, parts = f"{path}:{number}", line.split("||")
        if len(parts) != 2:
            raise DataError(f"{where}: expected 'attribute : value | ...||text', with one '||'; got {line[:100]!r}")
        yield Row(where, f"{path.stem}:{number}", {"input": parts[0], "output": parts[1]})


FORMATS: Formats = {".csv": csv_rows, ".txt": _line_rows, ".jsonl": jsonl_rows}
