"""The WebNLG challenge 2017: texts from sets of DBpedia triples (Gardent et al. 2017).

Read from the challenge's XML (a file, or a folder of them: `train`, `dev`, `test`), from rows as `prepare`
writes them, or from the hub's `web_nlg`. An entry makes one example, of its modified triples and of the texts
that were marked good; its category is the topic. The test folder holds its entries three times (without
texts, those of unseen topics, all): each is kept once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword.errors import DataError
from foreword.tasks.records import Collector, Example, Report, records_field, text_field
from foreword.tasks.sources import Formats, Row, Source, at, jsonl_rows, read_rows, xml_root

__all__ = ["FORMATS", "SEEN_CATEGORIES", "UNSEEN_CATEGORIES", "Triple", "linearize", "read", "xml_rows"]

SEEN_CATEGORIES = (
    "Airport",
    "Astronaut",
    "Building",
    "City",
    "ComicsCharacter",
    "Food",
    "Monument",
    "SportsTeam",
    "University",
    "WrittenWork",
)
"""Topics of the training data; the test data has them too."""

UNSEEN_CATEGORIES = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
"""Topics of the test data alone."""

Triple = Sequence[str]


def read(source: Source, *, split: str | None = None, config: str | None = None) -> tuple[list[Example], Report]:
    """Read WebNLG data; see `foreword.tasks.read` for the arguments."""
    found = Collector()
    entries = set()
    for row in read_rows(source, FORMATS, split=split, config=config):
        with at(row.where):
            if "input" in row.fields:
                found.add_prepared(row.fields, id=row.id)
                continue
            category, input = text_field(row.fields, "category"), linearize(_triples(row.fields))
            references = []
            for text in records_field(row.fields, "lex"):
                if text_field(text, "comment") == "good":
                    references.append(text_field(text, "text"))
                else:
                    found.drop("reference not marked good")
            entry = (category, input, *references)
            if not references:
                found.drop("entry without a good reference")
            elif entry in entries:
                found.drop("repeated entry")
            else:
                entries.add(entry)
                found.add(input, references, id=row.id, category=category)
    return found.result(source)


def linearize(triples: Sequence[Triple]) -> str:
    """(subject, property, object) triples as the paper's code has them for WebNLG: `| s : p : o | s : p : o`.

    Every triple has a bar before it, the first one too; names keep their underscores and quotes.
    """
    return " ".join(f"| {subject} : {relation} : {object}" for subject, relation, object in triples)


def xml_rows(path: Path) -> Iterator[Row]:
    """The entries of a file in the challenge's XML, in which DART comes too.

    Columns: `category`; `tripleset`, each triple three strings; `lex`, objects with `comment` and `text`.
    """
    for number, entry in enumerate(xml_root(path).iter("entry"), 1):
        id = entry.get("eid", str(number))
        where = f"{path}: entry {id}"
        with at(where):
            triples = [_triple(triple.text) for triple in entry.iterfind("modifiedtripleset/mtriple")]
        texts = [{"comment": lex.get("comment"), "text": "".join(lex.itertext())} for lex in entry.iterfind("lex")]
        fields = {"category": entry.get("category"), "tripleset": triples, "lex": texts}
        yield Row(where, f"{path.stem}:{id}", fields)


FORMATS: Formats = {".xml": xml_rows, ".jsonl": jsonl_rows}


def _triples(fields: Mapping[str, Any]) -> list[Triple]:
    if "tripleset" in fields:
        triples = fields["tripleset"]
    else:
        sets = [item.get("mtriple_set") for item in records_field(fields, "modified_triple_sets")]
        if len(sets) != 1 or not isinstance(sets[0], list):
            raise DataError(f"expected one set of triples in 'modified_triple_sets'; got {sets!r:.100}")
        triples = [_triple(triple) for triple in sets[0]]
    if not triples:
        raise DataError("expected modified triples; the entry has none")
    return triples


def _triple(text: object) -> Triple:
    parts = text.split(" | ") if isinstance(text, str) else []
    if len(parts) != 3:
        raise DataError(f"expected a triple 'subject | property | object'; got {text!r:.100}")
    return [part.strip() for part in parts]
