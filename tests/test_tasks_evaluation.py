"""`foreword evaluate`: outputs that are kept and gone on with, groups, and what is printed."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_cli import Run, base, folders, jsonl, prefix, run  # noqa: F401
from test_training import own_prefix
from tiny import CONTEXT, tiny_model, tiny_tokenizer

import foreword
import foreword.bases
import foreword.generation
from foreword.errors import DataError, SettingsError, TooLongError
from foreword.evaluate import score, score_groups
from foreword.generation import GenerateSettings, generate
from foreword.outputs import Outputs
from foreword.tasks import Example, evaluation
from foreword.tasks.evaluation import groups_of, outputs_of

EXAMPLES = [
    Example(f"name : {name} | food : {food}", (f"{name} has {food}.", f"Go to {name}."), category, f"row:{i}")
    for i, (name, food, category) in enumerate(
        [
            ("Aroma", "fish", "Food"),
            ("The Mill", "English", "Artist"),
            ("Zizzi", "pasta and more of it", "Food"),
            ("Loch Fyne", "Indian", "City"),
            ("Bibimbap House", "Korean", "Artist"),
        ]
    )
]
SETTINGS = GenerateSettings(max_new_tokens=7, num_beams=2, batch_size=1)


def of_gpt2() -> tuple[foreword.Base, foreword.Prefix]:
    base = foreword.Base(tiny_model("gpt2"), tiny_tokenizer("gpt2"), "tiny gpt2")
    return base, own_prefix(base)


def never() -> foreword.Base:
    raise AssertionError("the base was asked for")


def test_outputs_are_the_prefixs_and_are_kept(tmp_path: Path) -> None:
    base, prefix = of_gpt2()
    expected = generate(base, [one.input for one in EXAMPLES], prefix, settings=SETTINGS)
    file = tmp_path / "out" / "o.jsonl"
    assert outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, file) == expected
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [row["output"] for row in rows] == expected
    assert [(row["id"], row["category"], row["references"]) for row in rows] == [
        (one.id, one.category, list(one.references)) for one in EXAMPLES
    ]
    assert list(file.parent.iterdir()) == [file]
    assert outputs_of(never, prefix, EXAMPLES, SETTINGS, file) == expected


def test_outputs_that_were_sorted_since(tmp_path: Path) -> None:
    base, prefix = of_gpt2()
    expected = outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl")
    lines = (tmp_path / "o.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "o.jsonl").write_text("".join(lines[::-1]), "utf-8")
    assert outputs_of(never, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl") == expected
    assert len(set(expected)) > 1
    # nor is it another evaluation where the data has another name, which ids hold
    renamed = [dataclasses.replace(one, id=f"v2:{i}") for i, one in enumerate(EXAMPLES)]
    assert outputs_of(never, prefix, renamed, SETTINGS, tmp_path / "o.jsonl") == expected
    assert (tmp_path / "o.jsonl").read_text("utf-8") == "".join(lines[::-1])


@pytest.mark.parametrize("torn", [0, 7, 20, 40])
def test_a_killed_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: int) -> None:
    base, prefix = of_gpt2()
    expected = generate(base, [one.input for one in EXAMPLES], prefix, settings=SETTINGS)
    real = foreword.generation._run
    asked: list[int] = []

    def run(*args: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(args[-1])
        return real(*args)

    file = tmp_path / "o.jsonl"
    monkeypatch.setattr(foreword.generation, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, file)
    assert not file.exists()
    first = set(asked)
    part = file.with_name("o.jsonl.part")
    part.write_bytes(part.read_bytes() + part.read_bytes()[:torn])

    asked.clear()
    monkeypatch.setattr(foreword.generation, "_run", lambda *args: asked.extend(args[-1]) or real(*args))
    done: list[int] = []
    assert outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, file, on_rows=done.append) == expected
    assert len(asked) == 3
    assert not first & set(asked)
    assert (done[0], sum(done)) == (2, 5)


def test_what_is_done_is_on_disk_at_once_and_until_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 runs nothing more, and a disk may be full at the end."""
    base, prefix = of_gpt2()
    file, kept = tmp_path / "o.jsonl", []

    def look(rows: int) -> None:
        part = tmp_path / "o.jsonl.part"
        kept.append(part.read_bytes().count(b"\n") if part.exists() else 0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("foreword.outputs.write_jsonl", full)
        with pytest.raises(OSError, match="No space left"):
            outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, file, on_rows=look)
    assert kept[0] == 0
    assert kept[1:] == sorted(set(kept[1:]))
    assert kept[-1] == len(EXAMPLES)
    assert len(outputs_of(never, prefix, EXAMPLES, SETTINGS, file)) == len(EXAMPLES)


def test_outputs_of_another_version_are_another_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, prefix = of_gpt2()
    outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl")
    monkeypatch.setattr("foreword.outputs.__version__", "another")
    with pytest.raises(SettingsError, match="is of another run"):
        outputs_of(never, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl")


@pytest.mark.parametrize("unfinished", [False, True])
def test_outputs_of_another_evaluation_are_not_taken(tmp_path: Path, unfinished: bool) -> None:
    base, prefix = of_gpt2()
    file = tmp_path / "o.jsonl"
    outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, file)
    if unfinished:
        file.rename(tmp_path / "o.jsonl.part")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    others: list[Callable[[], Any]] = [
        lambda: outputs_of(never, own_prefix(base, seed=5), EXAMPLES, SETTINGS, file),
        lambda: outputs_of(never, prefix, EXAMPLES[:4], SETTINGS, file),
        lambda: outputs_of(never, prefix, EXAMPLES, GenerateSettings(max_new_tokens=8, num_beams=2), file),
        lambda: outputs_of(never, prefix, EXAMPLES, SETTINGS, file, identity=("float32",)),
    ]
    for other in others:
        with pytest.raises(SettingsError, match="is of another run .*: name another file, or give --overwrite"):
            other()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    greedy = GenerateSettings(max_new_tokens=7)
    expected = generate(base, [one.input for one in EXAMPLES], prefix, settings=greedy)
    assert outputs_of(lambda: base, prefix, EXAMPLES, greedy, file, overwrite=True) == expected
    assert outputs_of(never, prefix, EXAMPLES, greedy, file) == expected


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.part"])
@pytest.mark.parametrize(
    "content",
    [b"dear notes", b"dear\nnotes\n", b'{\n  "dear": "notes"\n}\n', b"\x08\0\xff\n{}", b"[" * 9999, b'{"run": "0"}'],
)
def test_a_file_of_something_else_is_not_taken(tmp_path: Path, name: str, content: bytes) -> None:
    base, prefix = of_gpt2()
    other = tmp_path / name
    other.write_bytes(content)
    with pytest.raises(SettingsError, match=f"{name} is of another run .*: name another file, or give --overwrite"):
        outputs_of(never, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl")
    assert other.read_bytes() == content
    assert len(outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl", overwrite=True)) == 5


def test_an_input_that_is_too_long_is_named_before_anything_is_generated(tmp_path: Path) -> None:
    base, prefix = of_gpt2()
    long = Example("a" * CONTEXT, ("y",), None, "dev:2")
    message = f"^the input 'dev:2': expected at most {CONTEXT} positions"
    done: list[int] = []
    with pytest.raises(TooLongError, match=message):
        outputs_of(lambda: base, prefix, [*EXAMPLES, long], SETTINGS, tmp_path / "o.jsonl", on_rows=done.append)
    assert sum(done) == 0
    assert not list(tmp_path.iterdir())


def test_records_that_are_nested_too_deep(tmp_path: Path) -> None:
    nested: Any = 0
    for _ in range(20_000):
        nested = [nested]
    with pytest.raises(DataError, match="expected records that JSON can hold; one is nested too deep"):
        Outputs(tmp_path / "o", [{"input": "a", "more": nested}], [None], settings=SETTINGS)


def test_another_batch_size_is_the_same_evaluation(tmp_path: Path) -> None:
    base, prefix = of_gpt2()
    first = outputs_of(lambda: base, prefix, EXAMPLES, SETTINGS, tmp_path / "o.jsonl")
    larger = GenerateSettings(max_new_tokens=7, num_beams=2, batch_size=3)
    assert outputs_of(never, prefix, EXAMPLES, larger, tmp_path / "o.jsonl") == first


def test_groups_of_webnlg() -> None:
    assert groups_of("webnlg", EXAMPLES) == {
        "all": [0, 1, 2, 3, 4],
        "seen": [0, 2, 3],
        "unseen": [1, 4],
        "Artist": [1, 4],
        "City": [3],
        "Food": [0, 2],
    }


def test_groups_of_other_categories() -> None:
    assert groups_of("dart", EXAMPLES).keys() == {"all", "Artist", "City", "Food"}
    assert groups_of("webnlg", [EXAMPLES[0], EXAMPLES[2]]) == {"all": [0, 1]}
    plain = [Example("x", ("y",), None, "1"), Example("x", ("y",), "all", "2"), Example("x", ("y",), "b", "3")]
    assert groups_of("dart", plain) == {"all": [0, 1, 2], "category all": [1], "b": [2]}


@pytest.mark.parametrize("metrics", ["webnlg.BLEU,webnlg.TER", "rouge,chrF", "e2e.BLEU"])
def test_a_groups_figures_are_those_of_the_group_alone(metrics: str) -> None:
    references = [one.references for one in EXAMPLES]
    outputs = ["Aroma has fish.", "go to the mill", "Zizzi has pasta", "Loch Fyne has Indian food.", "Korean House"]
    groups = {"all": range(5), "some": [4, 0, 2]}
    found = score_groups(references, outputs, groups, metrics, samples=20)
    for name, places in groups.items():
        alone = score([references[i] for i in places], [outputs[i] for i in places], metrics, samples=20)
        assert found[name].figures == pytest.approx(alone.figures)
        assert found[name].signatures == alone.signatures
        for metric, interval in alone.intervals.items():
            assert found[name].intervals[metric] == pytest.approx(interval)
    assert found["all"].figures != found["some"].figures


# the command


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return jsonl(
        tmp_path / "data.jsonl",
        [
            {"id": one.id, "category": one.category, "input": one.input, "output": text}
            for one in EXAMPLES
            for text in one.references
        ],
    )


@pytest.fixture
def own(prefix: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(prefix, tmp_path / "own.safetensors"))


LONG = "ACategoryOfASingleWordThatIsLongerThanANarrowScreenHasRoomFor"
FLAGS = ("--max-new-tokens", 5, "--num-beams", 2, "--samples", 30, "--metrics", "webnlg.BLEU,webnlg.TER")


def test_evaluate_prints_json(run: Run, base: Path, own: Path, rows: Path, tmp_path: Path) -> None:
    command = ("evaluate", "--base", base, "--prefix", own, "--task", "webnlg", "--data", rows, *FLAGS)
    ran = run(*command, "--json")
    assert (ran.code, ran.err) == (0, "")
    facts = json.loads(ran.out)
    loaded = foreword.load_base(base)
    settings = GenerateSettings(max_new_tokens=5, num_beams=2)
    outputs = generate(loaded, [one.input for one in EXAMPLES], foreword.Prefix.load(own), settings=settings)
    expected = score([one.references for one in EXAMPLES], outputs, "webnlg.BLEU,webnlg.TER", samples=30)
    assert facts["scores"]["all"] == {
        "rows": 5,
        "figures": expected.figures,
        "intervals": {name: list(ends) for name, ends in expected.intervals.items()},
    }
    assert facts["signatures"] == expected.signatures
    assert list(facts["scores"]) == ["all", "seen", "unseen", "Artist", "City", "Food"]
    assert facts["scores"]["unseen"]["rows"] == 2
    kept = tmp_path / "own.webnlg.outputs.jsonl"
    assert [json.loads(line)["output"] for line in kept.read_text("utf-8").splitlines()] == outputs


def test_evaluate_again_needs_no_base(
    run: Run,
    base: Path,
    own: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows.write_text(rows.read_text().replace('"City"', f'"{LONG}"'))
    command = ("evaluate", "--base", base, "--prefix", own, "--task", "webnlg", "--data", rows, *FLAGS)
    first = run(*command)
    some = run(*command, "--limit", 2, "--outputs", "some.jsonl")
    assert "; the first 2 of them taken; outputs in some.jsonl\n" in some.out
    monkeypatch.setattr(foreword.bases, "load_base", never)
    again = run(*command)
    assert again == first
    assert first.code == 0
    assert "taken" not in first.out
    assert "BLEU: sacrebleu|" in first.out
    assert f"\n {LONG} " in first.out
    words = [line.split() for line in first.out.splitlines()]
    assert [line[:2] for line in words if line[:1] == ["Artist"]] == [["Artist", "2"]]
    fewer = run(*command, "--limit", 2)
    assert fewer.code == 2
    assert "is of another run" in fewer.err


def test_a_recipe_of_generation(
    run: Run,
    base: Path,
    own: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[GenerateSettings] = []

    def outputs_of(base: object, prefix: object, examples: Sequence[Example], settings: Any, *_: Any, **__: Any) -> Any:
        seen.append(settings)
        return ["a text"] * len(examples)

    monkeypatch.setattr(evaluation, "outputs_of", outputs_of)
    command = ("evaluate", "--base", base, "--prefix", own, "--task", "summarization", "--data", rows, "--samples", 0)
    run(*command, "--recipe", "paper-xsum", "--num-beams", 5)
    run(*command)
    assert [(one.num_beams, one.length_penalty, one.max_new_tokens) for one in seen] == [(5, 0.8, 100), (5, 1.0, 100)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "e3e"), "expected a task of dart, e2e"),
        (("--metrics", "BLUE"), "there is no metric 'BLUE'"),
        (("--num-beams", 0), "expected num_beams of at least 1; got 0"),
        (("--data", "none.jsonl"), "none.jsonl: no such file or folder"),
        (("--prefix", "none.safetensors"), "no prefix file at none.safetensors"),
        (("--outputs", "own.safetensors"), "expected another file to write to than"),
        (("--outputs", "data.jsonl"), "expected another file to write to than"),
        (
            ("--data", "folder", "--split", "dev", "--overwrite", "--outputs", "folder/dev.jsonl"),
            "expected another file to",
        ),
        (("--outputs", "folder"), "expected a file to write to; folder is a folder"),
    ],
)
def test_what_is_wrong_is_found_before_the_base_is_loaded(
    run: Run,
    base: Path,
    own: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr(foreword.bases, "load_base", never)
    (rows.parent / "folder").mkdir()
    kept = [rows, own, Path(shutil.copy(rows, rows.parent / "folder" / "dev.jsonl"))]
    before = [path.read_bytes() for path in kept]
    ran = run("evaluate", "--base", base, "--prefix", own, "--task", "webnlg", "--data", rows, *flags)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}") or f": {message}" in ran.err, ran.err
    assert ran.err.count("\n") == 1
    assert [path.read_bytes() for path in kept] == before
