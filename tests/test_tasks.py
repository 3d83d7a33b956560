from __future__ import annotations

import errno
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from foreword.errors import DataError, MissingExtraError, SettingsError
from foreword.tasks import (
    TASKS,
    Example,
    Report,
    dart,
    e2e,
    prepare,
    read,
    summarization,
    training_rows,
    webnlg,
)

MILL = "name[The Mill], eatType[pub], food[English], priceRange[£20-25], familyFriendly[yes], near[Café Rouge]"
MILL_LINE = (
    "name : The Mill | Type : pub | food : English | price : £ 20 - 25 | family friendly : yes | near : Café Rouge"
)
CSV = f'mr,ref\n"{MILL}",A pub.\n"name[Zizzi], area[riverside]","By the river, ""Zizzi""."\n"{MILL}",  The Mill. \n'

ENTRY = """
<entry category="{category}" eid="{eid}" size="2">
  <originaltripleset><otriple>no | not | this</otriple></originaltripleset>
  <modifiedtripleset>
    <mtriple>Ada_Lovelace | field | "Maths &amp; more"</mtriple>
    <mtriple>Ada_Lovelace | birthPlace | London</mtriple>
  </modifiedtripleset>
  {lex}
</entry>"""
GOOD = '<lex comment="good" lid="Id1">Ada {}.</lex>'


def xml(*entries: str) -> str:
    return f"<?xml version='1.0' encoding='UTF-8'?><benchmark><entries>{''.join(entries)}</entries></benchmark>"


def entry(eid: str, category: str = "Astronaut", lex: str = GOOD.format("counts")) -> str:
    return ENTRY.format(eid=eid, category=category, lex=lex)


def write(path: Path, content: str | bytes | list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# E2E


@pytest.mark.parametrize(
    ("mr", "expected"),
    [
        (MILL, MILL_LINE),
        (
            "name[Alimentum], area[city centre], familyFriendly[no], near[Burger King]",
            "name : Alimentum | area : city centre | family friendly : no | near : Burger King",
        ),
        ("name[A], priceRange[less than £20]", "name : A | price : less than £ 20"),
        ("name[A], customer rating[5 out of 5]", "name : A | customer rating : 5 out of 5"),
        (" name [ Fish, chips ] ,food[]", "name : Fish, chips | food : "),
    ],
)
def test_e2e_is_linearized_as_in_the_papers_files(mr: str, expected: str) -> None:
    assert e2e.linearize(mr) == expected


@pytest.mark.parametrize("mr", ["", "   ", "The Mill", "name[The Mill", "name[The Mill]] ", "[The Mill]x", "a[b] c[d]"])
def test_what_is_no_meaning_representation_is_refused(mr: str) -> None:
    with pytest.raises(DataError, match=r"^expected a meaning representation, name\[The Mill\]"):
        e2e.linearize(mr)


def test_a_long_hostile_meaning_representation_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="expected a meaning representation"):
        e2e.linearize("a" + " " * 200_000 + "b")


def test_e2e_references_are_grouped_in_order_of_first_appearance(tmp_path: Path) -> None:
    examples, report = read("e2e", write(tmp_path / "a.csv", "\ufeff" + CSV.replace("\n", "\r\n")))
    assert examples == [
        Example(MILL_LINE, ("A pub.", "The Mill."), None, "a:2"),
        Example("name : Zizzi | area : riverside", ('By the river, "Zizzi".',), None, "a:3"),
    ]
    assert report == Report(kept=2, references=3, dropped={})
    assert str(report) == "kept 2 inputs with 3 references; dropped nothing"


def test_the_papers_lines_and_the_challenges_csv_give_the_same(tmp_path: Path) -> None:
    other = "name : Zizzi | area : riverside"
    text = f'{MILL_LINE}||A pub.\n\n{other}||By the river, "Zizzi".\n{MILL_LINE} || The Mill. \n'
    from_lines, report = read("e2e", write(tmp_path / "src1_valid.txt", text))
    from_csv, _ = read("e2e", write(tmp_path / "devset.csv", CSV))
    assert [(one.input, one.references) for one in from_lines] == [(one.input, one.references) for one in from_csv]
    assert report.references == 3


def test_empty_references_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", 'mr,ref\nname[A],x\nname[B],""\nname[A],"  "\nname[C],y\n')
    examples, report = read("e2e", source)
    assert [(one.input, one.references) for one in examples] == [("name : A", ("x",)), ("name : C", ("y",))]
    assert report.dropped == {"empty reference": 2}
    assert str(report) == "kept 2 inputs with 2 references; dropped 2 × empty reference"


def test_e2es_test_folder_holds_its_inputs_twice_and_those_without_references_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "testset.csv", "MR\nname[A]\nname[B]\n")
    write(tmp_path / "testset_w_refs.csv", "mr,ref\nname[A],x\nname[A],y\nname[B],z\n")
    write(tmp_path / "trainset.csv", CSV)
    examples, report = read("e2e", tmp_path, split="test")
    assert [(one.input, one.references) for one in examples] == [("name : A", ("x", "y")), ("name : B", ("z",))]
    assert report == Report(kept=2, references=3, dropped={"row without a reference": 2})
    (tmp_path / "testset_w_refs.csv").unlink()
    with pytest.raises(DataError, match="expected at least one input with a reference; .* 2 × row without a reference"):
        read("e2e", tmp_path, split="test")
    with pytest.raises(DataError, match=r"testset\.csv:2: expected the column"):
        read("e2e", tmp_path / "testset.csv")


# WebNLG


def test_webnlg_keeps_good_texts_of_the_modified_triples(tmp_path: Path) -> None:
    texts = GOOD.format("counts") + '<lex comment="toFix">Ada cuonts.</lex>' + GOOD.format("is  born")
    bad = '<lex comment="toFix">Ada?</lex>'
    source = write(tmp_path / "x.xml", xml(entry("Id1", lex=texts), entry("Id2", lex=bad), entry("Id3", "City")))
    examples, report = read("webnlg", source)
    linearized = '| Ada_Lovelace : field : "Maths & more" | Ada_Lovelace : birthPlace : London'
    assert examples == [
        Example(linearized, ("Ada counts.", "Ada is  born."), "Astronaut", "x:Id1"),
        Example(linearized, ("Ada counts.",), "City", "x:Id3"),
    ]
    assert report.dropped == {"reference not marked good": 2, "entry without a good reference": 1}


def test_webnlgs_test_folder_holds_its_entries_three_times_and_each_is_kept_once(tmp_path: Path) -> None:
    seen, unseen = entry("Id1"), entry("Id2", "Politician", GOOD.format("rules"))
    write(tmp_path / "test/testdata_no_lex.xml", xml(entry("Id1", lex=""), entry("Id2", "Politician", "")))
    write(tmp_path / "test/testdata_unseen_with_lex.xml", xml(unseen))
    write(tmp_path / "test/testdata_with_lex.xml", xml(seen, unseen))
    write(tmp_path / "train/1triples/1triple_Airport_train_challenge.xml", xml(entry("Id1", "Airport")))
    examples, report = read("webnlg", tmp_path, split="test")
    assert {(one.category, one.references) for one in examples} == {
        ("Astronaut", ("Ada counts.",)),
        ("Politician", ("Ada rules.",)),
    }
    assert report.kept == len(examples) == 2
    assert report.dropped == {"entry without a good reference": 2, "repeated entry": 1}


def test_entities_that_expand_are_refused(tmp_path: Path) -> None:
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><benchmark>&b;</benchmark>'
    with pytest.raises(DataError, match=r"x\.xml: expected XML without a document type"):
        read("webnlg", write(tmp_path / "x.xml", bomb))


# DART

DART = [
    {
        "tripleset": [["[TABLECONTEXT]", "[TITLE]", "Ships"], ["Vasa", "SUNK_IN", "1628"]],
        "subtree_was_extended": False,
        "annotations": [
            {"source": "WikiSQL_lily", "text": "Vasa sank in 1628."},
            {"source": "WikiSQL_lily", "text": "In 1628 Vasa sank."},
        ],
    },
    {"tripleset": [["a", "b", "c"]], "annotations": []},
    {
        "tripleset": [["[TABLECONTEXT]", "[TITLE]", "Ships"], ["Vasa", "SUNK_IN", "1628"]],
        "annotations": [{"source": "WikiSQL_decl_sents", "text": "1628 saw Vasa sink."}],
    },
]


def test_dart_groups_entries_of_the_same_triples(tmp_path: Path) -> None:
    examples, report = read("dart", write(tmp_path / "d.json", json.dumps(DART)))
    references = ("Vasa sank in 1628.", "In 1628 Vasa sank.", "1628 saw Vasa sink.")
    input = "[TABLECONTEXT] : [title] : Ships | Vasa : sunk_in : 1628"
    assert examples == [Example(input, references, "WikiSQL_lily", "d:1")]
    assert report.dropped == {"entry without a text": 1}


def test_darts_xml_gives_what_its_json_gives(tmp_path: Path) -> None:
    entries = []
    for number, one in enumerate(DART, 1):
        triples = "".join(f"<mtriple>{' | '.join(triple)}</mtriple>" for triple in one["tripleset"])  # type: ignore[attr-defined]
        texts = "".join(f'<lex comment="{a["source"]}">{a["text"]}</lex>' for a in one["annotations"])  # type: ignore[attr-defined]
        head = f'<entry category="MISC" eid="{number}">'
        entries.append(f"{head}<modifiedtripleset>{triples}</modifiedtripleset>{texts}</entry>")
    from_xml = read("dart", write(tmp_path / "d.xml", xml(*entries)))
    from_json = read("dart", write(tmp_path / "d.json", json.dumps(DART)))
    assert from_xml == from_json
    assert from_json[0]
    # a release holds both: one of them is read
    assert read("dart", tmp_path) == from_json


def test_prepared_rows_that_say_null_for_an_id_are_of_one_input_alone(tmp_path: Path) -> None:
    rows = [{"input": text, "output": "y", "id": None} for text in ("a", "b", "a")]
    examples, _ = read("e2e", write(tmp_path / "p.jsonl", rows))
    assert [(one.input, one.references, one.id) for one in examples] == [("a", ("y", "y"), "p:1"), ("b", ("y",), "p:2")]


# summarization


@pytest.mark.parametrize("columns", [("document", "summary"), ("article", "highlights"), ("input", "output")])
def test_summaries_are_read_by_either_data_sets_columns(tmp_path: Path, columns: tuple[str, str]) -> None:
    source, target = columns
    rows = [
        {source: "Long.\nText.", target: "Short.\nTwo lines.", "id": 7, "category": "sport", "extra": None},
        {source: "Long.\nText.", target: "Other.", "id": None},
        {source: " ", target: "Nothing to sum up."},
    ]
    examples, report = read("summarization", write(tmp_path / "s.jsonl", rows))
    assert examples == [
        Example("Long.\nText.", ("Short.\nTwo lines.",), "sport", "7"),
        Example("Long.\nText.", ("Other.",), None, "s:2"),
    ]
    assert report.dropped == {"empty input": 1}


def test_the_papers_truncation_lengths() -> None:
    lengths = {name: (one.source, one.target, one.generated) for name, one in summarization.LENGTHS.items()}
    assert lengths == {"xsum": (512, 60, 100), "cnn_dm": (512, 56, 142)}


# folders, files and the hub


def test_a_folder_of_several_splits_is_read_one_split_at_a_time(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write(tmp_path / f"{name}set.csv", f"mr,ref\nname[{name}],x\n")
    write(tmp_path / "prepared.jsonl", [{"input": "not", "output": "this"}])
    with pytest.raises(DataError, match=r"holds files of several splits \(dev, train\): say which split"):
        read("e2e", tmp_path)
    for split, expected in (("train", "train"), ("dev", "dev"), ("validation", "dev")):
        assert [one.input for one in read("e2e", tmp_path, split=split)[0]] == [f"name : {expected}"]
    for split in ("test", "nonsense"):
        with pytest.raises(DataError, match=rf"expected files of the split '{split}'; .* splits: dev, train"):
            read("e2e", tmp_path, split=split)


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trainset.csv", CSV)
    with pytest.raises(SettingsError, match=r"split='train' is for folders and data sets of the hub"):
        read("e2e", path, split="train")
    with pytest.raises(SettingsError, match=r"config='en' is for data sets of the hub"):
        read("e2e", path, config="en")
    with pytest.raises(SettingsError, match=r"expected a task of dart, e2e, summarization, webnlg; got 'e2'"):
        read("e2", path)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "e2e": [{"meaning_representation": "name[A], eatType[pub]", "human_reference": "A is a pub."}],
    "webnlg": [
        {
            "category": "City",
            "eid": "Id1",
            "modified_triple_sets": {"mtriple_set": [["A | is in | B", "B | is in | C"]]},
            "lex": {"comment": ["good", "toFix"], "text": ["A is in B in C.", "A?"], "lid": ["Id1", "Id2"]},
        },
        {
            "category": "City",
            "eid": "Id2",
            "modified_triple_sets": {"mtriple_set": [["A | is in | C"]]},
            "lex": {"comment": [], "text": [], "lid": []},
        },
    ],
    "dart": [
        {
            "tripleset": [["A", "IS_IN", "B"]],
            "annotations": {"source": ["wiki", "wiki"], "text": ["A in B.", "B has A."]},
        },
        {"tripleset": [["A", "IS_IN", "C"]], "annotations": {"source": ["wiki"], "text": ["A in C."]}},
    ],
    "summarization": [{"article": "Long.", "highlights": "Short.", "id": "x1"}],
}
HUB_EXAMPLES = {
    "e2e": [Example("name : A | Type : pub", ("A is a pub.",), None, "row:1")],
    "webnlg": [Example("| A : is in : B | B : is in : C", ("A is in B in C.",), "City", "row:1")],
    "dart": [
        Example("A : is_in : B", ("A in B.", "B has A."), "wiki", "row:1"),
        Example("A : is_in : C", ("A in C.",), "wiki", "row:2"),
    ],
    "summarization": [Example("Long.", ("Short.",), None, "x1")],
}


@pytest.mark.parametrize("task", TASKS)
def test_data_sets_of_the_hub(tmp_path: Path, datasets: Any, task: str) -> None:
    """Through the real `datasets`, on a folder: what it takes for a name when no network is wanted."""
    write(tmp_path / "data/train.jsonl", HUB_ROWS[task])
    assert read(task, f"hub:{tmp_path / 'data'}")[0] == HUB_EXAMPLES[task]
    write(tmp_path / "data/test.jsonl", HUB_ROWS[task])
    with pytest.raises(DataError, match=r"hub:.*: holds several splits \(train, test\): say which split"):
        read(task, f"hub:{tmp_path / 'data'}")
    assert read(task, f"hub:{tmp_path / 'data'}", split="test")[0] == HUB_EXAMPLES[task]
    with pytest.raises(DataError, match=r"^hub:.*: cannot be loaded \(ValueError: Unknown split .*\)$"):
        read(task, f"hub:{tmp_path / 'data'}", split="nonsense")


def test_wrong_rows_of_the_hub_are_named(tmp_path: Path, datasets: Any) -> None:
    write(tmp_path / "data/train.jsonl", [{"mr": "name[A]", "ref": "x"}, {"mr": "name[A]", "ref": None}])
    with pytest.raises(DataError, match=r"^hub:.*: row 2: expected a text in 'ref'; got nothing$"):
        read("e2e", f"hub:{tmp_path / 'data'}")
    with pytest.raises(DataError, match=r"^hub:no/such-set: cannot be loaded \(.+\)$") as caught:
        read("e2e", "hub:no/such-set")
    assert "\n" not in str(caught.value)


def test_configuration_split_and_revision_reach_the_hub(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(HUB_ROWS["e2e"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = "hub:owner/name@refs/convert/parquet"
    assert read("e2e", source, split="validation", config="cleaned")[0] == HUB_EXAMPLES["e2e"]
    assert calls == [(("owner/name", "cleaned"), {"split": "validation", "revision": "refs/convert/parquet"})]


def test_without_datasets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'datasets'.*pip install 'foreword\[data\]'"):
        read("e2e", "hub:e2e_nlg")


# bad input: one line that names the place

LONE = '{"document": "a", "summary": "\\ud800"}'
MANY = "[" * 100_000
BAD: list[tuple[str, str, str | bytes, str]] = [
    ("e2e", "a.csv", "", r"a\.csv: the file is empty"),
    ("e2e", "a.csv", "\n \n", r"a\.csv: the file is empty"),
    (
        "e2e",
        "a.csv",
        "mr,ref\n",
        r"a\.csv: expected at least one input with a reference; kept 0 .* dropped nothing",
    ),
    ("e2e", "a.csv", "mr,ref\nname[A],\n", r"a\.csv: expected at least one .*; dropped 1 × empty reference"),
    ("e2e", "a.csv", "mr,text\nname[A],x\n", r"a\.csv:2: expected the column 'ref' or .*; got 'mr', 'text'"),
    ("e2e", "a.csv", "mr,ref\nname[A],x\nname[A]\n", r"a\.csv, line 3: expected 2 columns, as in the header"),
    ("e2e", "a.csv", "mr,ref,ref\nname[A],x,y\n", r"a\.csv: expected each column once in the header; got 'ref' twice"),
    ("e2e", "a.csv", "mr,ref\nname[A],x,y\n", r"a\.csv, line 2: expected 2 columns, as in the header"),
    ("e2e", "a.csv", "mr,ref\nname[A],x\nA,x\n", r"a\.csv:3: expected a meaning representation"),
    ("e2e", "a.csv", 'mr,ref\nname[A],"x\n', r"a\.csv, line 2: not a table \(unexpected end of data\)"),
    (
        "e2e",
        "a.csv",
        "mr,ref\nname[A],caf\xe9\n".encode("latin-1"),
        r"a\.csv: expected UTF-8; byte 18 \(0xe9\), in line 2, is not: save",
    ),
    ("e2e", "a.txt", b"a : b||c\na : b||\xff\n", r"a\.txt:2: expected UTF-8; byte 7 \(0xff\) is not: save"),
    ("e2e", "a.txt", b"", r"a\.txt: the file is empty"),
    (
        "e2e",
        "a.txt",
        "a : b||c\na : b|c\n",
        r"a\.txt:2: expected 'attribute : value \| .* with one '\|\|'; got 'a : b\|c'",
    ),
    ("e2e", "a.jsonl", '{"input": "a"}\n', r"a\.jsonl:1: expected the column 'output'; got 'input'"),
    ("e2e", "a.tsv", "mr\tref\n", r"a\.tsv: expected a file ending in \.csv or \.txt or \.jsonl"),
    ("webnlg", "a.xml", xml(entry("Id1"))[:-9], r"a\.xml: expected XML \(.*line 9.*\)"),
    ("webnlg", "a.xml", xml(), r"a\.xml: expected at least one input"),
    (
        "webnlg",
        "a.xml",
        xml(entry("Id7")).replace(" | field |", " field "),
        r"a\.xml: entry Id7: expected a triple",
    ),
    (
        "webnlg",
        "a.xml",
        xml("<entry category='x' eid='Id3'/>"),
        r"a\.xml: entry Id3: expected modified triples",
    ),
    (
        "webnlg",
        "a.xml",
        xml(entry("Id1")).replace("category", "kind"),
        r"entry Id1: expected a text in 'category'",
    ),
    ("webnlg", "a.xml", xml(entry("Id1")).encode("utf-16"), r"a\.xml: expected UTF-8; byte 0 \(0xff\) is not"),
    ("dart", "a.json", "{", r"a\.json: expected JSON \(Expecting property name"),
    ("dart", "a.json", MANY, r"a\.json: expected JSON \("),
    ("dart", "a.json", "{}", r"a\.json: expected a JSON list of entries; got dict"),
    ("dart", "a.json", "[{}, 3]", r"a\.json: entry 1: expected a list of triples in 'tripleset'; got None"),
    (
        "dart",
        "a.json",
        '[{"tripleset": [["a", "b"]]}]',
        r"a\.json: entry 1: expected a triple of three strings; got \['a', 'b'\]",
    ),
    (
        "dart",
        "a.json",
        '[{"tripleset": [["a", "b", NaN]]}]',
        r"entry 1: expected a triple of three strings; got .*nan",
    ),
    (
        "dart",
        "a.json",
        '[{"tripleset": [["a", "b", "c"]], "annotations": "x"}]',
        r"expected a list of objects in 'annotations'",
    ),
    (
        "dart",
        "a.json",
        '[{"tripleset": [["a", "b", "c"]], "annotations": [{"text": 1}]}]',
        r"entry 1: expected a text in 'text'; got int",
    ),
    (
        "summarization",
        "a.jsonl",
        '{"document": "a"}\n',
        r"a\.jsonl:1: expected the column 'summary' or 'highlights' or 'output'",
    ),
    (
        "summarization",
        "a.jsonl",
        '\n{"document": "a", "summary": NaN}',
        r"a\.jsonl:2: expected a text in 'summary'; got float",
    ),
    (
        "summarization",
        "a.jsonl",
        '{"document": "a", "summary": "b"}\n{"docu',
        r"a\.jsonl:2: expected one JSON object a line",
    ),
    ("summarization", "a.jsonl", "[]\n", r"a\.jsonl:1: expected a JSON object; got list"),
    (
        "summarization",
        "a.jsonl",
        LONE,
        r"a\.jsonl:1: expected Unicode text; got a lone surrogate in '\\ud800'",
    ),
]


@pytest.mark.parametrize(("task", "name", "content", "message"), BAD)
def test_bad_input_is_one_line_that_names_the_place(
    tmp_path: Path, task: str, name: str, content: str | bytes, message: str
) -> None:
    out = write(tmp_path / "out/kept.jsonl", "what was there before\n")
    with pytest.raises(DataError, match=message) as caught:
        prepare(task, write(tmp_path / name, content), out)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert out.read_text() == "what was there before\n"
    assert [path.name for path in out.parent.iterdir()] == ["kept.jsonl"]


@pytest.mark.parametrize("task", TASKS)
def test_sources_that_are_not_there(tmp_path: Path, task: str) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder \(a data set of the hub is named hub:NAME\)"):
        read(task, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected files ending in .*\.jsonl; the folder holds none"):
        read(task, tmp_path)


# preparing


def test_training_rows_are_one_a_reference() -> None:
    examples = [Example("a", ("b", "c"), None, "1"), Example("d", ("e",), "City", "2")]
    assert training_rows(examples) == [
        {"input": "a", "output": "b"},
        {"input": "a", "output": "c"},
        {"input": "d", "output": "e", "category": "City"},
    ]


SOURCES: dict[str, tuple[str, str]] = {
    "e2e": ("a.csv", CSV),
    "webnlg": (
        "a.xml",
        xml(entry("Id1", lex=GOOD.format("counts") + GOOD.format("codes")), entry("Id2", "City")),
    ),
    "dart": ("a.json", json.dumps(DART)),
    "summarization": ("a.jsonl", '{"document": "Ein\\nText", "summary": "Kürzer"}\n'),
}


@pytest.mark.parametrize("task", TASKS)
def test_prepared_rows_read_back_as_the_same_examples(tmp_path: Path, task: str) -> None:
    name, content = SOURCES[task]
    source, out = write(tmp_path / name, content), tmp_path / "new" / "rows.jsonl"
    examples, report = read(task, source)
    assert prepare(task, source, out) == report
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in row if key != "id"} for row in rows] == training_rows(examples)
    assert len(rows) == report.references > 0
    assert read(task, out)[0] == examples


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", CSV)
    (tmp_path / "x").mkdir()
    with pytest.raises(SettingsError, match=r"expected another file to write to than .*a\.csv, which would be lost"):
        prepare("e2e", source, tmp_path / "x" / ".." / "a.csv")
    with pytest.raises(SettingsError, match=r"expected a file to write to; .* is a folder"):
        prepare("e2e", source, tmp_path)
    for folder_or_file in (source, tmp_path):
        with pytest.raises(
            SettingsError, match=r"expected another file to write to than .*a\.csv, which would be lost"
        ):
            prepare("e2e", folder_or_file, source)
    with pytest.raises(SettingsError, match=r"expected a name that ends in .jsonl, .*; got .*rows\.tsv"):
        prepare("e2e", source, tmp_path / "rows.tsv")
    assert source.read_text() == CSV
    prepare("e2e", tmp_path, write(tmp_path / "a.jsonl", "not among what is read"))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "a.csv", CSV), write(tmp_path / "out/rows.jsonl", "before\n")
    real, calls = json.dumps, []

    def full_at_the_second_row(*args: Any, **kwargs: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr("foreword.writing.json.dumps", full_at_the_second_row)
    with pytest.raises(OSError, match="No space left"):
        prepare("e2e", source, out)
    assert out.read_text() == "before\n"
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]


# the real data


def test_the_e2e_development_set(data_folder: Path) -> None:
    examples, report = read("e2e", data_folder / "e2e/devset.csv")
    assert (report.kept, report.references, report.dropped) == (547, 4672, {})
    assert examples[0].input == "name : Alimentum | area : city centre | family friendly : no"
    names = Counter(part.split(" : ")[0] for one in examples for part in one.input.split(" | "))
    assert set(names) == {
        "name",
        "Type",
        "food",
        "price",
        "customer rating",
        "area",
        "family friendly",
        "near",
    }
    prices = {found[1] for one in examples if (found := re.search(r"price : ([^|]+?)(?: \||$)", one.input))}
    assert prices == {"£ 20 - 25", "less than £ 20", "more than £ 30", "cheap", "moderate", "high"}


def test_e2e_groups_are_those_of_the_challenges_own_reference_file(data_folder: Path) -> None:
    examples, _ = read("e2e", data_folder / "e2e/devset.csv")
    text = (data_folder / "e2e-metrics-example/devel-conc.txt").read_text(encoding="utf-8")
    groups = [tuple(map(str.strip, group.splitlines())) for group in text.strip().split("\n\n")]
    assert len(groups) == 10
    assert [one.references for one in examples[: len(groups)]] == groups


@pytest.mark.parametrize(
    ("split", "kept", "references", "to_fix", "without"),
    [("train", 6935, 18025, 77, 5), ("dev", 871, 2258, 10, 1)],
)
def test_webnlg_2017(data_folder: Path, split: str, kept: int, references: int, to_fix: int, without: int) -> None:
    examples, report = read("webnlg", data_folder / "webnlg", split=split)
    assert (report.kept, report.references) == (kept, references)
    assert report.dropped == {"reference not marked good": to_fix, "entry without a good reference": without}
    assert {one.category for one in examples} == set(webnlg.SEEN_CATEGORIES)
    assert len({one.id for one in examples}) == kept
    assert all(re.fullmatch(r"(\| .+? : .+? : .+?){1,7}", one.input) for one in examples)


def test_dart_development_set(data_folder: Path) -> None:
    examples, report = read("dart", data_folder / "dart")
    assert (report.kept, report.references, report.dropped) == (2721, 6980, {})
    assert examples[0].input == (
        "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina"
    )
    by_source = Counter({one.category: 0 for one in examples})
    for one in examples:
        by_source[one.category] += len(one.references)
    assert (by_source["e2e"], by_source["webnlg"], len(by_source)) == (4290, 2268, 6)


def test_debian_synopses(data_folder: Path) -> None:
    examples, report = read("summarization", data_folder / "debian-synopsis/dev.jsonl")
    assert (report.kept, report.references, report.dropped) == (1000, 1000, {})
    assert (examples[1].id, examples[1].references) == (
        "cog",
        ("Single-window web browser based on WPE WebKit",),
    )


def test_dart_linearizes_relations_in_small_letters() -> None:
    assert dart.linearize([("A B", "IS_IN", "C"), ("C", "[TITLE]", "D E")]) == "A B : is_in : C | C : [title] : D E"
