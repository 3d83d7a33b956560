from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreword import coco, metrics
from foreword.coco import UnavailableError
from foreword.errors import DataError, MissingExtraError, SettingsError
from foreword.evaluate import paired_bootstrap, read_outputs, read_references, score, score_files, score_groups

sacrebleu = pytest.importorskip("sacrebleu", reason="no sacrebleu: pip install 'foreword[eval]'")

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")

# Odd in the ways that may move a figure from the challenge's script: a blank output, one word, entities, `<skipped>`,
# prices, typographic quotes, an emoji, a final sigma, one to three references.
ODD_REFERENCES = [
    ["The Eagle is a low-priced coffee shop, near Burger King.", "The Eagle (£20-25) is near Burger King!"],
    [
        'It\'s rated 3.5 out of 5 -- "good" &amp; cheap.',
        "It doesn't cost 1,000.50 pounds...",
        "Rated 5 out of 5: it's good & cheap.",
    ],
    ["Café Zoë serves naïve “crêpes”."],
    ["The Punter is in the riverside area.", "In the riverside area is The Punter, a pub."],
    ["Blue Spice has a price range of more than £30 and a high customer rating."],
    ["The Mill."],
    ["Clowns is kid-friendly; it has a 5 out of 5 rating.", "Clowns: a kid friendly pub, rated 5/5."],
]
ODD_OUTPUTS = [
    "The Eagle is a LOW-PRICED coffee shop near burger king.",
    'It\'s rated 3.5 out of 5, "good" & cheap, e.g. 1,000.50',
    "Café Zoë serves crêpes … 🙂",
    "The Punter is in the riverside area.",
    "",
    "Mill",
    "Clowns is a kid-friendly <skipped> pub with a 5-star rating; ΣΟΦΟΣ.",
]
ODD_FIGURES = {  # what the challenge's script computes for these
    "BLEU": 0.4340828705338149,
    "NIST": 4.429330074015499,
    "METEOR": 0.38784511430963303,
    "ROUGE_L": 0.6970117756568418,
    "CIDEr": 3.6514627600126794,
}


def sentences(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", ",", "near", "river", "1.5", "hours", "-", "Two", "(", "it)", "."]
    return [" ".join(rng.choices(words, k=rng.randrange(6, 14))) for _ in range(number)]


def corpus(number: int) -> tuple[list[list[str]], list[str], list[str]]:
    """References in unequal numbers, a system that is near them, and one that is nearer."""
    rng = random.Random(number)
    texts = sentences(number, 3 * number)
    references = [texts[3 * i : 3 * i + 1 + i % 3] for i in range(number)]

    def near(group: list[str], changes: int) -> str:
        words = rng.choice(group).split()
        for _ in range(changes):
            words[rng.randrange(len(words))] = rng.choice(["cat", "dog", "Mat", "."])
        return " ".join(words)

    return references, [near(group, 4) for group in references], [near(group, 1) for group in references]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(most)]


# ---------------------------------------------------------------- the E2E challenge's figures


def test_the_example_of_the_e2e_script(data_folder: Path) -> None:
    folder = data_folder / "e2e-metrics-example"
    expected = json.loads((folder / "scores.json").read_text())
    found = score_files(folder / "devel-conc.txt", folder / "baseline-output.txt", ["BLEU", "NIST"])
    assert {name: round(value, 4) for name, value in found.figures.items()} == {
        name: expected[name] for name in ("BLEU", "NIST")
    }


@needs_java
def test_the_example_of_the_e2e_script_in_caption_metrics(data_folder: Path) -> None:
    folder = data_folder / "e2e-metrics-example"
    expected = json.loads((folder / "scores.json").read_text())
    found = score_files(folder / "devel-conc.txt", folder / "baseline-output.txt", "ROUGE_L,CIDEr")
    assert {name: round(value, 4) for name, value in found.figures.items()} == {
        name: expected[name] for name in ("ROUGE_L", "CIDEr")
    }


@pytest.mark.slow
@needs_java
def test_the_example_of_the_e2e_script_in_full(data_folder: Path) -> None:
    folder = data_folder / "e2e-metrics-example"
    expected = json.loads((folder / "scores.json").read_text())
    found = score_files(folder / "devel-conc.txt", folder / "baseline-output.txt")
    assert list(found.figures) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    for name, value in found.figures.items():
        assert f"{value:.4f}" == f"{expected[name]:.4f}", name


def test_odd_outputs_have_the_figures_of_the_e2e_script() -> None:
    found = score(ODD_REFERENCES, ODD_OUTPUTS, ["BLEU", "NIST"]).figures
    assert found == pytest.approx({name: ODD_FIGURES[name] for name in ("BLEU", "NIST")}, rel=1e-12)
    library = sacrebleu.BLEU(lowercase=True).corpus_score(ODD_OUTPUTS, streams(ODD_REFERENCES)).score
    assert abs(library / 100 - found["BLEU"]) > 0.01, "why sacrebleu does not do here"


@needs_java
def test_odd_outputs_have_the_caption_figures_of_the_e2e_script() -> None:
    found = score(ODD_REFERENCES, ODD_OUTPUTS, ["ROUGE_L", "CIDEr"]).figures
    assert found == pytest.approx({name: ODD_FIGURES[name] for name in ("ROUGE_L", "CIDEr")}, rel=1e-12)


@pytest.mark.slow
@needs_java
def test_odd_outputs_have_the_meteor_of_the_e2e_script_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert score(ODD_REFERENCES, ODD_OUTPUTS, "METEOR").figures["METEOR"] == pytest.approx(
        ODD_FIGURES["METEOR"], rel=1e-12
    )


def test_nist_by_hand() -> None:
    # Six reference words, "the" twice. All but "a" match: four words of log2 6 and one of log2 3. Of the five bigrams
    # only "the cat" informs, by log2 2, as "the" has two successors.
    found = score([["the cat sat on the mat"]], ["the cat sat on a mat"], "NIST").figures["NIST"]
    assert found == pytest.approx((math.log2(3) + 4 * math.log2(6)) / 6 + 1 / 5)


def test_nist_halves_at_two_thirds_of_the_average_length() -> None:
    references = [["a b c d e f g h i j", "p q r s t u v w"]]  # ten words and eight, nine on average
    found = score(references, ["a b c d e f"], "NIST").figures["NIST"]
    assert found == pytest.approx(math.log2(18) / 2)


def test_nist_where_short_outputs_leave_no_five_grams() -> None:
    # Four words: no 5-grams to divide by, where the script stops. The other orders count.
    assert score([["a b c d"]], ["a b c d"], "NIST").figures["NIST"] == pytest.approx(2.0)


def test_bleu_of_short_outputs_by_hand() -> None:
    # One word counts 1, 0, -1 and -2 n-grams, and a blank output is one word.
    one = score([["a b c d e f g h"], ["f"]], ["a b c d e f g h", "f"], "BLEU").figures["BLEU"]
    assert one == pytest.approx((9 / 9 * 7 / 7 * 6 / 5 * 5 / 3) ** 0.25)
    blank = score([["a b c d e f g h"], ["x y"]], ["a b c d e f g h", ""], "BLEU").figures["BLEU"]
    assert blank == pytest.approx(math.exp(1 - 10 / 9) * (8 / 9 * 7 / 7 * 6 / 5 * 5 / 3) ** 0.25)


def test_bleu_without_a_match_of_an_order_is_all_but_zero() -> None:
    found = score([["a b c d e"]], ["a b c x e"], "BLEU").figures["BLEU"]
    assert found == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * 1e-15 / 2) ** 0.25)


@pytest.mark.parametrize("number", [7, 31])
def test_bleu_is_sacrebleus_on_ordinary_outputs(number: int) -> None:
    references, outputs, _ = corpus(number)
    expected = sacrebleu.BLEU(lowercase=True, tokenize="13a").corpus_score(outputs, streams(references))
    assert min(expected.counts) > 0
    assert score(references, outputs, "BLEU").figures["BLEU"] == pytest.approx(expected.score / 100, rel=1e-9)


@pytest.mark.parametrize("suite", ["BLEU", "NIST", "rouge", "chrf"])
def test_the_order_of_outputs_and_of_references_does_not_matter(suite: str) -> None:
    references, outputs, _ = corpus(13)
    expected = score(references, outputs, suite).figures
    order = random.Random(5).sample(range(13), 13)
    shuffled = score([references[i][::-1] for i in order], [outputs[i] for i in order], suite).figures
    assert shuffled == pytest.approx(expected)


def test_case_and_spaces_around_do_not_matter_to_the_e2e_script() -> None:
    references, outputs, _ = corpus(11)
    expected = score(references, outputs, "BLEU,NIST").figures
    assert score(references, [f"\t{text.upper()} " for text in outputs], "BLEU,NIST").figures == expected


@needs_java
def test_the_tokenizer_keeps_a_line_a_text() -> None:
    texts = ["Café “Zoë” – it's 5.", "", "...", "a |||  b", "<b> open", "tag </b>", "Inc.", ""]
    assert coco.tokenize(texts) == ["café zoë it 's 5", "", "", "a | | | b", "<b> open", "tag </b>", "inc.", ""]


@needs_java
def test_line_breaks_of_every_kind_are_spaces() -> None:
    references, outputs = [["a cat sat on it"], ["the dog ran on"]], ["a cat sat on it", "a dog ran on"]
    broken = ["a\x0bcat\u2028sat\r\non\x85it", "a\x1cdog ran\fon\n"]
    expected = score(references, outputs, "BLEU,ROUGE_L,CIDEr,chrF").figures
    assert score(references, broken, "BLEU,ROUGE_L,CIDEr,chrF").figures == expected


@pytest.mark.slow
@needs_java
def test_meteor_adds_up_as_the_library_does() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    references = coco.tokenize([text for group in ODD_REFERENCES for text in group])
    grouped = [[references.pop(0) for _ in group] for group in ODD_REFERENCES]
    outputs = coco.tokenize(ODD_OUTPUTS)
    assert outputs[3] == grouped[3][0], "one that matches from end to end: its chunk is not added"
    draws = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 2, 0, 0, 0], [0, 3, 0, 1, 2, 0, 1], [0, 0, 0, 0, 2, 0, 0]])
    found = coco.meteor(grouped, outputs, draws)

    library = Meteor()
    try:
        for row, value in zip(draws, found, strict=True):
            drawn = np.repeat(np.arange(7), row)
            expected, _ = library.compute_score(
                {place: grouped[i] for place, i in enumerate(drawn)},
                {place: [outputs[i]] for place, i in enumerate(drawn)},
            )
            assert value == pytest.approx(expected, rel=1e-12)
    finally:
        library.meteor_p.kill()
        library.meteor_p.communicate()


# ---------------------------------------------------------------- WebNLG's, ROUGE, chrF, BERTScore


def test_webnlg_bleu_by_hand() -> None:
    pytest.importorskip("unidecode", reason="no Unidecode: pip install 'foreword[eval]'")
    # Accents go, words part at what is no word character, an underscore stays, case does not count.
    found = score([["Café-Zoë is_in Łódź, 5"]], ["CAFE - zoe IS_IN lodz , 5"], "webnlg.BLEU").figures["BLEU"]
    assert found == pytest.approx(100)
    # The fourth reference does not count.
    references = [["a b c d e x", "a b c d y", "z", "a b c d e f"]]
    found = score(references, ["a b c d e f"], "webnlg.BLEU").figures["BLEU"]
    assert found == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # Without a match of some order there is nothing.
    assert score([["a b c d"]], ["a b c x"], "webnlg.BLEU").figures["BLEU"] == 0


def test_webnlg_bleu_counts_references_that_are_not_there_as_empty() -> None:
    pytest.importorskip("unidecode", reason="no Unidecode: pip install 'foreword[eval]'")
    # Two words are nearer to none, of the second reference that is not there, than to the seven of the first.
    references = [["a b c d e f", "a b c d e"], ["t u v w x y z"]]
    found = score(references, ["a b c d e f", "t u"], "webnlg.BLEU").figures["BLEU"]
    assert found == pytest.approx(100.0), "8 words, against 6 and 0"


def test_webnlg_ter_by_hand() -> None:
    pytest.importorskip("unidecode", reason="no Unidecode: pip install 'foreword[eval]'")
    # One edit to the nearer reference, over the references' average of five words.
    assert score([["a b c d", "p q r s t u"]], ["a b x d"], "TER").figures["TER"] == pytest.approx(1 / 5)


@pytest.mark.slow
@needs_java
def test_webnlg_meteor_of_unequal_references() -> None:
    pytest.importorskip("unidecode", reason="no Unidecode: pip install 'foreword[eval]'")
    found = score([["a big cat", "x"], ["the dog ran home"]], ["a big cat", "the dog ran home"], "webnlg")
    assert found.figures["METEOR"] == pytest.approx(1.0)
    assert found.missing == {}


def test_rouge_stems_as_the_field_does() -> None:
    found = score([["the cat runs"]], ["the cats running"], "rouge").figures
    assert found["ROUGE-1"] == found["ROUGE-L"] == pytest.approx(1)


def test_of_two_references_as_near_in_length_bleu_takes_the_shorter() -> None:
    """As the challenge's script does: 6 words, references of 5 and 7; the longer would cost a brevity penalty."""
    references, outputs = [["a b c d e", "a b c d e f g"]], ["a b c d e f"]
    assert score(references, outputs, "BLEU").figures["BLEU"] == pytest.approx(1)


def test_rouge_is_rouge_scores_best_over_references() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    references, outputs, _ = corpus(7)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name, kind in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        each = [
            max(scorer.score(reference, text)[kind].fmeasure for reference in group)
            for group, text in zip(references, outputs, strict=True)
        ]
        assert 0 < np.mean(each) < 1
        assert score(references, outputs, name).figures[name] == pytest.approx(np.mean(each))


def test_chrf_is_sacrebleus() -> None:
    references, outputs, _ = corpus(11)
    expected = sacrebleu.CHRF().corpus_score(outputs, streams(references)).score
    assert score(references, outputs, "chrF").figures["chrF"] == pytest.approx(expected)


def test_bertscore_is_asked_for_written_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(outputs: list[str], references: list[list[str]], model_type: str) -> list[torch.Tensor]:
        assert (outputs, references, model_type) == (["a", "b"], [["x"], ["z"]], "roberta-large")
        return [torch.zeros(2), torch.zeros(2), torch.tensor([0.75, 0.25])]

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=answers))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/there")
    monkeypatch.setattr(metrics, "version", lambda _: "1")
    found = score([["x"], ["y"], ["z"]], ["a", " ", "b"], "bertscore")
    assert found.figures == {"BERTScore": pytest.approx(1 / 3)}


# ---------------------------------------------------------------- the bootstrap


def test_intervals_hold_the_figures_and_repeat() -> None:
    references, outputs, _ = corpus(31)
    found = score(references, outputs, "BLEU,NIST,rouge,chrf", samples=200)
    assert set(found.intervals) == set(found.figures) == set(found.signatures)
    for name, (low, high) in found.intervals.items():
        assert low < found.figures[name] < high, name
    assert score(references, outputs, "BLEU,NIST,rouge,chrf", samples=200) == found
    assert score(references, outputs, "BLEU", samples=200, seed=7).intervals["BLEU"] != found.intervals["BLEU"]
    assert score(references, outputs, "BLEU").intervals == {}


def test_a_draw_has_the_figure_of_the_outputs_in_it() -> None:
    references, outputs, _ = corpus(7)
    texts = metrics.Texts(references, outputs)
    draws = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 3, 0, 1, 2, 0, 1]])
    drawn = np.repeat(np.arange(7), draws[1])
    for name in ("BLEU", "ROUGE-L", "chrF"):
        values, _ = metrics.chosen(name)[name](texts, draws)
        again = score([references[i] for i in drawn], [outputs[i] for i in drawn], name).figures[name]
        assert values[1] == pytest.approx(again)
        assert values[0] != pytest.approx(again)


@pytest.mark.parametrize("name", ["BLEU", "chrF"])
def test_the_paired_bootstrap_is_sacrebleus(name: str) -> None:
    from sacrebleu.significance import PairedTest

    references, worse, better = corpus(31)
    metric = sacrebleu.BLEU(lowercase=True) if name == "BLEU" else sacrebleu.CHRF()
    scale = 100 if name == "BLEU" else 1
    test = PairedTest([("worse", worse), ("better", better)], {name: metric}, streams(references), "bs", 300)
    _, results = test()
    (expected,) = (result[1] for key, result in results.items() if key != "System")
    found = paired_bootstrap(references, worse, better, name, samples=300)[name]
    assert found.system * scale == pytest.approx(expected.score)
    low, high = score(references, better, name, samples=300).intervals[name]
    assert (high - low) / 2 * scale == pytest.approx(expected.ci, rel=0.02)
    # not its p-value, which is of one side
    assert found.p_value < 0.05
    assert 0 < found.interval[0] < found.system - found.baseline < found.interval[1]


def test_the_paired_bootstrap_finds_nothing_where_there_is_nothing() -> None:
    references, outputs, _ = corpus(31)
    changed = [*outputs[:-1], references[-1][0]]
    found = paired_bootstrap(references, outputs, changed, "NIST", samples=100)["NIST"]
    assert found.p_value > 0.05
    assert found.interval[0] <= 0 <= found.interval[1]


def test_the_p_value_is_of_both_sides() -> None:
    references, outputs, other = corpus(30)
    assert paired_bootstrap(references, outputs, outputs, samples=50)["BLEU"].p_value == 1
    # Each is as far ahead on its half as the other is on the other half.
    one, two = outputs + other, other + outputs
    found = paired_bootstrap(references * 2, one, two, "BLEU", samples=200)["BLEU"]
    assert found.p_value > 0.95


def test_the_p_value_holds_its_level() -> None:
    rng = np.random.default_rng(0)
    references, texts = [["a b c d e f g h"]] * 40, [" ".join("abcdefgh"[:n]) for n in range(1, 9)]

    def p_value() -> float:
        pair = ([texts[n] for n in rng.integers(8, size=40)] for _ in range(2))
        return paired_bootstrap(references, *pair, "ROUGE-L", samples=100)["ROUGE-L"].p_value

    assert 0.02 < np.mean([p_value() < 0.05 for _ in range(300)]) < 0.08


def test_runs_on_the_same_inputs_are_not_more_inputs() -> None:
    references, outputs, other = corpus(17)
    metrics, groups = "BLEU,NIST,chrF", {"all": range(17), "some": range(2, 15)}

    def found(runs: int) -> dict[str, object]:
        scores = score_groups(references, outputs * runs, groups, metrics, runs=runs, samples=50)
        pairs = paired_bootstrap(references, outputs * runs, other * runs, metrics, runs=runs, samples=50)
        return {
            **{f"{group} {name}": ends for group, one in scores.items() for name, ends in one.intervals.items()},
            **{name: (*one.interval, one.p_value) for name, one in pairs.items()},
        }

    assert found(3) == {name: pytest.approx(ends) for name, ends in found(1).items()}
    both = score_groups(references, outputs + other, {"some": [1, 4]}, "BLEU", runs=2)["some"].figures
    alone = score([references[i] for i in (1, 4, 1, 4)], [outputs[1], outputs[4], other[1], other[4]], "BLEU").figures
    assert both == pytest.approx(alone)


def test_samples_out_of_range() -> None:
    references, outputs, _ = corpus(7)
    with pytest.raises(SettingsError, match="samples is -1: expected 0 for no intervals"):
        score(references, outputs, "BLEU", samples=-1)
    with pytest.raises(SettingsError, match="samples is 0: expected 1 or more"):
        paired_bootstrap(references, outputs, outputs, samples=0)


# ---------------------------------------------------------------- what is missing, and what is wrong


def test_without_java_the_other_figures_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = score(*corpus(7)[:2], "e2e", samples=3)
    assert list(found.figures) == list(found.intervals) == ["BLEU", "NIST"]
    assert list(found.missing) == ["METEOR", "ROUGE_L", "CIDEr"]
    for reason in found.missing.values():
        assert reason.startswith("this needs Java (8 or later), and no `java` is on the PATH: install")
        assert "\n" not in reason


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [
        ("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu", "NIST"),
        ("sacrebleu", "sacrebleu", "chrF"),
        ("pycocoevalcap.tokenizer.ptbtokenizer", "pycocoevalcap", "CIDEr"),
        ("rouge_score.rouge_scorer", "rouge-score", "ROUGE-2"),
        ("unidecode", "Unidecode", "TER"),
    ],
)
def test_without_a_package_the_other_figures_come(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    other = "ROUGE-1" if package != "rouge-score" else "BLEU"
    found = score(*corpus(7)[:2], [name, other])
    assert list(found.figures) == list(found.signatures) == [other]
    assert found.missing == {name: str(MissingExtraError("eval", package))}
    with pytest.raises(MissingExtraError, match=package):
        paired_bootstrap(*corpus(7), name, samples=3)


def test_without_bert_score_or_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert score([["x"]], ["y"], "bertscore").missing == {
        "BERTScore": "this needs the package 'bert-score': pip install bert-score"
    }
    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace())
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    reason = score([["x"]], ["y"], "bertscore").missing["BERTScore"]
    assert reason == "this needs the model roberta-large, which is not on this machine: hf download roberta-large"


def stand_in(folder: Path, script: str) -> str:
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(folder)


def test_a_java_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = stand_in(tmp_path, "echo 'Error: no memory' >&2; echo more >&2; exit 1")
    monkeypatch.setenv("PATH", path)
    found = score(*corpus(7)[:2], "BLEU,CIDEr")
    assert list(found.figures) == ["BLEU"]
    assert found.missing["CIDEr"].startswith("the PTB tokenizer stopped: Error: no memory (it needs Java 8 or later")
    with pytest.raises(UnavailableError, match=r"^METEOR stopped: Error: no memory \(it needs Java 8[^\n]*$"):
        coco.meteor([["a"]], ["a"], np.ones((1, 1)))


def test_a_java_that_is_no_program_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "java").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = score(*corpus(7)[:2], "BLEU,METEOR,CIDEr")
    assert list(found.figures) == ["BLEU"]
    assert "Exec format error" in found.missing["METEOR"]
    assert "Exec format error" in found.missing["CIDEr"]


def test_a_tokenizer_that_loses_a_line_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", stand_in(tmp_path, "echo one"))
    with pytest.raises(DataError, match="the PTB tokenizer gave 2 lines for 3 texts"):
        coco.tokenize(["a", "b", "c"])


@needs_java
def test_references_of_punctuation_alone() -> None:
    with pytest.raises(DataError, match="no reference has a word but punctuation"):
        score([["..."], ["!"]], ["a", "b"], "CIDEr")
    assert score([["..."], ["!"]], ["a", "b"], "ROUGE_L").figures == {"ROUGE_L": 0.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("e2e,bleurt", "there is no metric 'bleurt': expected some of e2e, webnlg, rouge, chrf, bertscore, "),
        (["e2e", "webnlg"], "two of these metrics are named BLEU: score one suite at a time"),
        ([], "no metric was named: expected some of e2e"),
        ("", "there is no metric ''"),
    ],
)
def test_metrics_that_do_not_exist(names: str | Sequence[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        score([["a"]], ["a"], names)


def test_a_name_of_two_suites_is_the_e2e_scripts() -> None:
    assert metrics.chosen("BLEU, TER,METEOR") == {
        "BLEU": metrics.SUITES["e2e"]["BLEU"],
        "TER": metrics.SUITES["webnlg"]["TER"],
        "METEOR": metrics.SUITES["e2e"]["METEOR"],
    }
    assert metrics.chosen("webnlg.BLEU") == {"BLEU": metrics.SUITES["webnlg"]["BLEU"]}
    assert metrics.chosen("webnlg") == metrics.SUITES["webnlg"]
    assert metrics.chosen(["e2e", "BLEU", "chrf"]) == {**metrics.SUITES["e2e"], **metrics.SUITES["chrf"]}


@pytest.mark.parametrize(
    ("references", "outputs", "message"),
    [
        ([["a"]], ["a", "b"], "there are references for 1 outputs, but 2 outputs"),
        ([], [], "there are no outputs"),
        (["a"], ["a"], "the references of output 1 are one text: expected a list of texts"),
        ([["a"], []], ["a", "b"], "output 2 has no reference, or a blank one"),
        ([["a"], ["b", " "]], ["a", "b"], "output 2 has no reference, or a blank one"),
        ([["a"], [None]], ["a", "b"], "output 2 has no reference, or a blank one"),
        ([["a"], ["b"]], ["a", math.nan], "output 2 is no text: expected one, which may be empty; got float"),
        ([["a"]], np.array([]), "references for 1 outputs, but 0"),
        ([np.array([])], np.array(["a"]), "output 1 has no reference"),
        ([["a"]], ["b\ud800"], "a text has half a character at position 1"),
    ],
)
def test_texts_that_cannot_be_scored(references: list[list[str]], outputs: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(references, outputs, "BLEU")


# ---------------------------------------------------------------- files


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def test_files_are_read_as_the_e2e_script_reads_them(tmp_path: Path) -> None:
    path = written(tmp_path, "references", "one\r\n two \r\n \t\r\nthree\x0bfour\n\nfünf\n\n\n")
    assert read_references(path) == [["one", "two"], ["three", "four"], ["fünf"]]
    path = written(tmp_path, "outputs", " a b\r\n\nc\n\n")
    assert read_outputs(path) == ["a b", "", "c", ""]


def test_one_reference_a_line_for_as_many_outputs(tmp_path: Path) -> None:
    references, outputs = (
        written(tmp_path, "r", "a b c d\ne f g h\n"),
        written(tmp_path, "h", "a b c d\ne f g h"),
    )
    assert score_files(references, outputs, "BLEU").figures == {"BLEU": pytest.approx(1.0)}
    # But several references of the one output, where there is one.
    outputs = written(tmp_path, "h", "e f g h\n")
    assert score_files(references, outputs, "BLEU").figures == {"BLEU": pytest.approx(1.0)}


def test_files_of_unequal_numbers(tmp_path: Path) -> None:
    references, outputs = written(tmp_path, "r", "a\n\nb\n"), written(tmp_path, "h", "a\nb\n\n")
    with pytest.raises(DataError, match=r"r has references for 2 outputs, but .*h has 3: expected one output a line"):
        score_files(references, outputs, "BLEU")


@pytest.mark.parametrize("read", [read_outputs, read_references])
def test_files_that_cannot_be_read(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(DataError, match="cannot read .*none: No such file"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match="cannot read .*: Is a directory"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"latin: expected UTF-8; byte 3 \(0xe9\) is not: save it"):
        read(written(tmp_path, "latin", "Caf\xe9\n".encode("latin-1")))
    with pytest.raises(DataError, match="empty is empty: expected one text a line"):
        read(written(tmp_path, "empty", ""))


def test_references_with_an_output_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="r, line 3: an output without a reference: expected one blank line"):
        read_references(written(tmp_path, "r", "a\n\n\nb\n"))
    with pytest.raises(DataError, match="r, line 1: an output without a reference"):
        read_references(written(tmp_path, "r", "\nb\n"))
    with pytest.raises(DataError, match="r is blank: expected references, one a line"):
        read_references(written(tmp_path, "r", "\n \n"))
