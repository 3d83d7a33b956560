"""DART: texts from triples of tables, WebNLG and E2E (Nan et al. 2021).

Read from the JSON of its releases, from their XML, from rows as `prepare` writes them, or from the hub.
Entries with the same triples make one example, as in the paper's code; its category is the source of its
first text, such as `webnlg` or `WikiSQL_lily`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foreword.errors import DataError
from foreword.tasks.records import Collector, Example, Report, records_field, text_field
from foreword.tasks.sources import Formats, Source, at, json_rows, jsonl_rows, read_rows
from foreword.tasks.webnlg import Triple, xml_rows

__all__ = ["FORMATS", "linearize", "read"]

FORMATS: Formats = {".json": json_rows, ".xml": xml_rows, ".jsonl": jsonl_rows}


def read(source: Source, *, split: str | None = None, config: str | None = None) -> tuple[list[Example], Report]:
    """Read DART data; see `foreword.tasks.read` for the arguments."""
    found = Collector()
    for row in read_rows(source, FORMATS, split=split, config=config):
        with at(row.where):
            if "input" in row.fields:
                found.add_prepared(row.fields, id=row.id)
                continue
            input = linearize(_triples(row.fields))
            texts = records_field(row.fields, "lex" if "lex" in row.fields else "annotations")
            if not texts:
                found.drop("entry without a text")
                continue
            references = [text_field(text, "text") for text in texts]
            origin = text_field(texts[0], "source", "comment")
            found.add(input, references, id=row.id, category=origin, key=input)
    return found.result(source)


def linearize(triples: Sequence[Triple]) -> str:
    """(subject, relation, object) triples as the paper's code has them for DART: `s : r : o | s : r : o`.

    Relations are in small letters, and bars stand between the triples only.
    """
    return " | ".join(f"{subject} : {relation.lower()} : {object}" for subject, relation, object in triples)


def _triples(fields: Mapping[str, Any]) -> list[Triple]:
    triples = fields.get("tripleset")
    if not isinstance(triples, list) or not triples:
        raise DataError(f"expected a list of triples in 'tripleset'; got {triples!r:.100}")
    for triple in triples:
        strings = isinstance(triple, list) and all(isinstance(part, str) for part in triple)
        if not strings or len(triple) != 3:
            raise DataError(f"expected a triple of three strings; got {triple!r:.100}")
    return triples
