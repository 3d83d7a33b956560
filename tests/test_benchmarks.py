"""What the benchmarks rest on: the rule for learning rates, the ways to tune, studies that go on, and the small BART."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import base_of, tiny_model, tiny_tokenizer
from transformers import BartConfig
from transformers.utils import logging

import benchmarks.bart
import benchmarks.report
import benchmarks.study
import foreword
from benchmarks import shapes, train_speed, train_vs_peft, users_help
from benchmarks.bart import BOS, EOS, MASK, corrupt, pretrain
from benchmarks.methods import GRIDS, METHODS, WARMUP, Options, attached_texts, fit
from benchmarks.paper.command import options_of
from benchmarks.paper.studies import STUDIES
from benchmarks.report import report
from benchmarks.runs import MOST_RATES, Runs, best_rate
from benchmarks.study import Arm, Data, Study, Unit, compare, lines, sampled, todo
from foreword.attach import attach
from foreword.bases import load_base
from foreword.data import frame, rows_of
from foreword.generation import GenerateSettings, end_ids
from foreword.loss import mean_loss
from foreword.prefix import Framing
from foreword.tasks import Example
from foreword.writing import write_jsonl

# PEFT asks transformers by a name that its newest release has given up
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RECORDS = [{"input": f"item {i}", "output": f"{i} is {'odd' if i % 2 else 'even'}"} for i in range(11)]


# learning rates and runs


@pytest.mark.parametrize(
    ("scores", "best", "tried"),
    [
        ({}, None, [1.0, 2.0, 4.0]),
        ({2.0: 5}, None, [1.0, 4.0]),
        ({1.0: 1, 2.0: 5, 4.0: 3}, 2.0, []),
        ({1.0: 1, 2.0: 5, 4.0: 7}, None, [8.0]),
        ({1.0: 9, 2.0: 5, 4.0: 7}, None, [0.5]),
        ({0.5: 8, 1.0: 9, 2.0: 5, 4.0: 7}, 1.0, []),
        ({2.0**i: i for i in range(MOST_RATES)}, 2.0 ** (MOST_RATES - 1), []),
    ],
)
def test_the_best_rate_is_not_at_the_edge(scores: dict[float, float], best: float | None, tried: list[float]) -> None:
    assert best_rate(scores, [1.0, 2.0, 4.0]) == (best, tried)


class One(NamedTuple):
    name: str


def test_runs_go_on_and_are_not_done_twice(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    names = ["a", "b", "c"]
    did: list[str] = []

    def run(unit: One) -> dict[str, str]:
        if unit.name == "b" and did.count("b") == 0:
            did.append("b")
            raise KeyboardInterrupt
        did.append(unit.name)
        return {"is": unit.name}

    def left() -> list[One]:
        return [One(name) for name in names if runs.get(name) is None]

    with pytest.raises(KeyboardInterrupt):
        runs.work(left, run)
    assert runs.get("a") == {"is": "a"}
    assert runs.get("b") is None
    with runs.claim("c") as mine:
        assert mine
        runs.work(left, run)  # as another process: the claimed one is left to us
    assert did == ["a", "b", "b"]
    runs.work(left, run)
    assert did == ["a", "b", "b", "c"]
    assert sorted(path.name for path in runs.folder.iterdir()) == ["a.json", "b.json", "c.json"]


# ways to tune


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_method_learns_and_its_prefix_is_what_it_learnt(method: str, dtype: torch.dtype) -> None:
    base = base_of("llama", dtype=dtype)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    rows = rows_of(base, RECORDS, Framing())
    learner = METHODS[method](base, rows, Options(length=3, rank=2, seed=1))
    assert learner.parameters
    first = learner.loss(rows)
    first.backward()
    silent = [p.shape for p in learner.parameters if p.grad is None or not p.grad.any()]
    # LoRA's second factor starts at zero, and so does our MLP's last layer: what comes before has no gradient yet
    before_last = {"prefix": [(3, 84), (512, 84), (512,)]}
    assert all(shape[0] == 2 for shape in silent) if method == "lora" else silent == before_last.get(method, [])
    for parameter in learner.parameters:
        parameter.grad = None
    fitted = fit(base, learner, rows, lr=3e-3, epochs=6, batch_size=4, seed=0)
    assert fitted.tokens == 6 * sum(map(len, rows))
    last = learner.loss(rows).item()
    assert last < first.item() - 0.05
    prefix = learner.finish()
    changed = {
        name for name, p in before.items() if not torch.equal(p, dict(base.model.named_parameters()).get(name, p))
    }
    assert not any(p.requires_grad for p in base.model.parameters())
    if method in ("full", "top2", "lora"):
        assert prefix is None
        expected = {"full": set(before), "top2": {n for n in before if ".layers.1." in n or ".layers.2." in n}}
        assert changed == expected.get(method, set())
        return
    assert changed == set()
    assert prefix is not None
    prefix.check(base)
    with attach(base.model, prefix) as attachment:
        again = mean_loss(base, rows, attachment)
    # the batch's mean is over y tokens, as mean_loss has it
    assert again == pytest.approx(last, rel=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(
    "variant",
    [
        {"reparametrization": "direct"},
        {"reparametrization": "embedding"},
        {"infix": True},
        {"init": "random"},
        {"init_text": "words of the task"},
    ],
    ids=str,
)
def test_variants_of_the_prefix_learn_and_generate(variant: dict[str, Any]) -> None:
    base = base_of("llama")
    rows = rows_of(base, RECORDS, Framing())
    learner = METHODS["prefix"](base, rows, Options(length=3, **variant))
    first = learner.loss(rows).item()
    assert all(parameter.requires_grad for parameter in learner.parameters)
    fit(base, learner, rows, lr=3e-3, epochs=6, batch_size=4, seed=0)
    assert learner.loss(rows).item() < first - 0.05
    prefix = learner.finish()
    assert prefix is not None
    assert prefix.infix is variant.get("infix", False)
    settings = foreword.GenerateSettings(max_new_tokens=3)
    assert len(foreword.generate(base, ["item 1", "item 20"], prefix, settings=settings)) == 2


@pytest.mark.parametrize("own", [{}, {"reparametrization": "direct"}, {"init_text": "words of the task"}], ids=str)
def test_the_prefix_that_is_compared_is_that_of_train(own: dict[str, Any]) -> None:
    base = base_of("llama")
    rows = rows_of(base, RECORDS, Framing())
    learner = METHODS["prefix"](base, rows, Options(length=3, seed=1, **own))
    fit(base, learner, rows, lr=3e-3, epochs=3, batch_size=4, seed=1)
    compared = learner.finish()
    settings = foreword.TrainSettings(length=3, epochs=3, batch_size=4, lr=3e-3, warmup=WARMUP, seed=1, **own)
    trained = foreword.train(base, RECORDS, settings=settings)
    assert compared is not None
    for mine, theirs in zip(compared.sections["decoder"], trained.sections["decoder"], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_how_many_numbers_a_task_keeps() -> None:
    def count(method: str, **options: Any) -> int:
        base = base_of("llama")
        rows = rows_of(base, RECORDS, Framing())
        return METHODS[method](base, rows, Options(**options)).kept

    assert count("prefix", length=5) == 5 * 3 * 2 * 2 * 14
    assert count("prefix", length=5, reparametrization="direct") == 5 * 3 * 2 * 2 * 14
    assert count("prefix", length=5, reparametrization="embedding") == 5 * 84
    assert count("peft-prefix", length=5) == count("peft-direct", length=5) == 5 * 3 * 2 * 2 * 14
    assert count("prompt", length=5) == 5 * 84
    assert count("lora", rank=2) == 3 * (2 * (84 + 84) + 2 * (84 + 28))
    total = sum(p.numel() for p in base_of("llama").model.parameters())
    assert count("full") == total
    assert 0 < count("top2") < total


def test_the_decoders_section_alone() -> None:
    base = base_of("bart")
    rows = rows_of(base, RECORDS, Framing())
    alone = METHODS["prefix"](base, rows, Options(length=3, section="decoder"))
    assert alone.kept == 3 * 3 * 2 * 84
    encoder: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: Any, output: Any) -> None:
        encoder["last"] = output.last_hidden_state.detach().clone()

    handle = base.model.get_encoder().register_forward_hook(keep)
    first = alone.loss(rows).item()
    inside = encoder["last"]
    fit(base, alone, rows, lr=3e-3, epochs=2, batch_size=4, seed=0)
    assert alone.loss(rows).item() < first
    assert torch.equal(encoder["last"], inside), "the encoder has a prefix"
    handle.remove()
    assert alone.finish() is None
    assert alone.attached
    settings, inputs = GenerateSettings(max_new_tokens=7, batch_size=2), [record["input"] for record in RECORDS]
    inside_texts = attached_texts(base, inputs, settings=settings, framing=Framing())
    slowly = []
    for one in inputs:
        given = torch.tensor([frame(base, {"input": one}, Framing())])
        y = [base.start_id]
        while len(y) < 8 and (len(y) == 1 or y[-1] not in end_ids(base)):
            with torch.no_grad():
                logits = base.model(input_ids=given, decoder_input_ids=torch.tensor([y]), use_cache=False).logits
            y.append(int(logits[0, -1].argmax()))
        slowly.append(base.decode([token for token in y[1:] if token not in end_ids(base)]))
    assert inside_texts == slowly


def test_bare_texts_of_what_stays_attached_are_foreword_s() -> None:
    base = base_of("bart")
    settings = GenerateSettings(max_new_tokens=9, num_beams=2, batch_size=3)
    inputs = [record["input"] for record in RECORDS]
    expected = foreword.generate(base, inputs, settings=settings)
    assert attached_texts(base, inputs, settings=settings, framing=Framing()) == expected


def test_a_run_that_diverges_says_so() -> None:
    base = base_of("llama")
    rows = rows_of(base, RECORDS, Framing())
    learner = METHODS["full"](base, rows, Options())
    assert fit(base, learner, rows, lr=1e30, epochs=2, batch_size=4, seed=0).loss == float("inf")


# studies


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    logging.disable_progress_bar()
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "base")
    yield tmp_path / "base"
    logging.enable_progress_bar()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (benchmarks.study, benchmarks.report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


EXAMPLES = [
    Example(row["input"], (row["output"], f"It's {row['output']}."), None, str(i)) for i, row in enumerate(RECORDS)
]


def tiny_study(folder: Path, **more: Any) -> Study:
    def data(sample: int, rows: int) -> Data:
        test = EXAMPLES[6:11]
        return Data(
            train=sampled(RECORDS[:6], rows, sample),
            dev=EXAMPLES[:2],
            test=test,
            groups={"seen": [0, 1], "unseen": [2, 3, 4]},
        )

    own = {"rows": 4, "epochs": 1, "options": Options(length=2)}
    return Study(
        **{
            "name": "tiny",
            "title": "Tiny",
            "base": str(folder),
            "arms": [
                Arm(name="tuned 4", method="top2", line="tuned", x=4, **own),
                Arm(name="prefix 4", method="prefix", line="prefix", x=4, **own),
                Arm(name="prefix 5", method="prefix", line="prefix", x=5, rate_of="prefix 4", **{**own, "rows": 5}),
            ],
            "data": data,
            "metrics": "rouge,webnlg.TER",
            "primary": "ROUGE-L",
            "contrasts": [("tuned 4", "prefix 4")],
            "samples": 2,
            "new_tokens": 4,
            "published": [("theirs", {"ROUGE-L": 37.25})],
            "differs": "all",
            "x_label": "rows",
            **more,
        }
    )


def test_a_study_goes_on_and_reports_what_is_missing(
    folder: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(folder)
    first = todo(study)
    tuned, prefix, more = (arm.setup for arm in study.arms)
    assert [(unit.setup, unit.sample, unit.seed) for unit in first] == [(tuned, 0, 0)] * 3 + [(prefix, 0, 0)] * 3
    text = report(study, command="the command")
    assert "**Unfinished**: runs that can be made now and are not there: 6, the first" in text
    assert "No arm has a finished run at a chosen learning rate yet." in text

    scores = {tuned: {1e-4: 0.1, 2e-4: 0.2, 4e-4: 0.1}, prefix: {2.5e-4: 0.1, 5e-4: 0.3, 1e-3: 0.2}}
    done: list[Unit] = []
    real = benchmarks.study.run

    def run(unit: Unit) -> dict[str, Any]:
        if len(done) == 8:
            raise KeyboardInterrupt
        done.append(unit)
        result = real(study, unit)
        if unit.sample == 0 and unit.setup in scores:
            result["dev_score"] = scores[unit.setup][unit.lr]
        return result

    with pytest.raises(KeyboardInterrupt):
        study.runs.work(lambda: todo(study), run)
    assert done[6:] == [Unit(more, 5e-4, 0, 0), Unit(more, 5e-4, 1, 0)]
    assert [unit.setup for unit in todo(study)] == [tuned, prefix]
    text = report(study, command="the command")
    assert (
        "**Unfinished**: runs that can be made now and are not there: 2, the first "
        "`top2-4x1-length_2-lr0.0002-sample1-seed0`" in text
    )
    facts = json.loads((results / "tiny.json").read_text("utf-8"))
    assert {line["arm"]: line["runs"] for line in facts["lines"]} == {"tuned 4": 1, "prefix 4": 1, "prefix 5": 2}
    assert facts["contrasts"][0]["runs"] == 1

    done.clear()
    study.runs.work(lambda: todo(study), lambda unit: real(study, unit))
    assert todo(study) == []
    text = report(study, command="the command")
    assert "Unfinished" not in text
    assert f"base `{folder.name}`" in text  # and not where it lies
    assert text == (results / "tiny.md").read_text("utf-8")
    for words in (
        "# Tiny",
        "`the command`",
        "## Test inputs: unseen",
        "| theirs | 37.25 |",
        "prefix 4 – tuned 4",
        "What differs: all",
    ):
        assert words in text, words
    assert (results / "tiny.svg").read_text("utf-8").startswith("<?xml")
    facts = json.loads((results / "tiny.json").read_text("utf-8"))
    assert facts["unfinished"] == []
    (line,) = [line for line in facts["lines"] if line["arm"] == "prefix 4"]
    assert (line["learning_rate"], line["runs"], len(line["values"])) == (5e-4, 2, 2)
    assert line["groups"]["seen"]["figures"].keys() == {"ROUGE-1", "ROUGE-2", "ROUGE-L", "TER"}


def test_runs_that_diverged_and_rates_at_the_edge_are_said(folder: Path, results: Path) -> None:
    study = tiny_study(folder, samples=1, seeds=3)
    tuned, prefix, more = (arm.setup for arm in study.arms)

    def write(setup: str, lr: float, seed: int, dev_score: float, diverged: bool = False) -> None:
        unit = Unit(setup, lr, 0, seed)
        result = {"parameters": 5, "dtype": "torch.float32", "train_seconds": 1.0, "dev_score": dev_score}
        kept = {"test_score": 0.5, "test_outputs": ["7 is odd"] * 5, "machine": {"threads": 1, "torch": "2"}}
        lost = {"test_score": 0.0, "test_outputs": None}
        study.runs.write(unit.name, {**unit._asdict(), **result, "diverged": diverged, **(lost if diverged else kept)})

    for i in range(MOST_RATES):  # the greatest is the best, always
        write(tuned, 1e-4 * 2**i, 0, i / 10)
    for seed in (1, 2):
        write(tuned, 1e-4 * 2 ** (MOST_RATES - 1), seed, 0.0, diverged=True)
    for lr, dev_score in ((2.5e-4, 0.1), (5e-4, 0.2), (1e-3, 0.1)):
        write(prefix, lr, 0, dev_score)
    for seed in (0, 1, 2):
        write(more, 5e-4, seed, 0.0, diverged=True)
    text = report(study, command="the command")
    assert "| tuned 4 | 4 | 5 | 0.0128 (edge) | 1 (2 diverged) | 0.5000 (0.5000 to 0.5000) |" in text
    assert "| prefix 4 | 4 | 5 | 0.0005 | 1 | 0.5000 (0.5000 to 0.5000) |" in text
    assert "| prefix 5 | 5 | 5 | 0.0005 | 0 (3 diverged) | – | – |" in text
    assert "Runs that diverged have no outputs: all figures are of the others." in text
    assert "(edge): of the learning rates tried this is the least or the greatest" in text
    facts = json.loads((results / "tiny.json").read_text("utf-8"))
    assert [(line["runs"], line["diverged"], line["at_the_edge"]) for line in facts["lines"]] == [
        (1, 2, True),
        (1, 0, False),
        (0, 3, False),
    ]
    (compared,) = [one for one in facts["contrasts"] if one["group"] == "all"]
    assert (compared["difference"], compared["p_value"]) == (0, 1)
    write(prefix, 5e-4, 0, 0.3, diverged=True)
    write(prefix, 5e-4, 1, 0.0)
    report(study, command="the command")
    facts = json.loads((results / "tiny.json").read_text("utf-8"))
    assert facts["contrasts"] == [], "of no run that both have"
    for path in list(study.runs.folder.iterdir()):
        result = json.loads(path.read_text("utf-8"))
        study.runs.write(path.stem, {**result, "diverged": True, "test_outputs": None})
    text = report(study, command="the command")
    assert "| prefix 4 | 4 | 5 | 0.0005 | 0 (2 diverged) | – |" in text


def test_more_runs_on_the_same_inputs_do_not_narrow_the_intervals(folder: Path, results: Path) -> None:
    rows = {"parameters": 5, "dtype": "torch.float32", "train_seconds": 1.0, "diverged": False, "test_score": 0.5}
    outputs = {"tuned 4": ["6 is even", "7", "8 is odd", "9 is odd", "even"], "prefix 4": ["6 is odd"] * 5}
    found = []
    for samples in (1, 3):
        study = tiny_study(folder, samples=samples)
        for name, texts in outputs.items():
            setup = study.arm(name).setup
            for i, lr in enumerate(GRIDS[study.arm(name).method]):
                for sample in range(samples):
                    unit = Unit(setup, lr, sample, 0)
                    own = {**unit._asdict(), "dev_score": i % 2, "test_outputs": texts}
                    study.runs.write(unit.name, {**rows, **own})
        made = lines(study, samples=100)
        assert [len(line.runs) for line in made] == [samples, samples]
        scores = {f"{line.arm.name} {group}": one for line in made for group, one in line.scores.items()}
        intervals = {f"{key} {name}": ends for key, one in scores.items() for name, ends in one.intervals.items()}
        for one in compare(study, made, samples=100):
            intervals[one["group"]] = (*one["interval"], one["p_value"])
        found.append(intervals)
    assert found[1] == {key: pytest.approx(ends) for key, ends in found[0].items()}


def test_a_run_of_the_decoders_section_alone(results: Path, tmp_path: Path) -> None:
    tiny_model("bart").save_pretrained(tmp_path / "bart")
    tiny_tokenizer("bart").save_pretrained(tmp_path / "bart")
    options = Options(length=2, section="decoder")
    arm = Arm(name="alone", method="prefix", rows=4, epochs=1, options=options)
    study = tiny_study(tmp_path / "bart", arms=[arm], metrics="rouge", primary="ROUGE-L", contrasts=[])
    result = benchmarks.study.run(study, todo(study)[0])
    assert len(result["test_outputs"]) == 5


def test_runs_of_several_bases_are_not_mixed(folder: Path, results: Path) -> None:
    study = tiny_study(folder)
    unit = todo(study)[0]._replace(lr=0.1)
    study.runs.write("of old", {"dev_score": 0.0})  # without a fingerprint
    result = benchmarks.study.run(study, unit)
    # the base's, not that of what fine-tuning made of it
    assert result["fingerprint"] == load_base(folder).fingerprint
    assert result["batch_size"] == study.batch_size
    study.runs.write(unit.name, {**result, "fingerprint": "another"})
    message = "expected runs of one base in tiny; got those with the fingerprints .*another"
    with pytest.raises(SystemExit, match=message):
        benchmarks.study.run(study, todo(study)[0])
    study.runs.write("another", {"fingerprint": result["fingerprint"]})
    with pytest.raises(SystemExit, match=message):
        report(study, command="the command")


def test_what_another_study_has_run_is_not_run_again(folder: Path, results: Path) -> None:
    first, second = (tiny_study(folder, name=name, shared="both") for name in ("first", "second"))
    for unit in todo(first)[:3]:
        first.runs.write(unit.name, {**unit._asdict(), "dev_score": unit.lr == 2e-4})
    best = Unit(first.arm("tuned 4").setup, 2e-4, 1, 0)
    assert first.runs.get(best.name) is None
    assert [one for one in todo(second) if one.setup == best.setup] == [best]
    other = tiny_study(folder, name="second", shared="both", settings={"dtype": "bfloat16"})
    assert len(todo(other)) == 6


def test_a_setup_is_told_by_all_that_makes_it() -> None:
    own = {"method": "prefix", "rows": 4, "epochs": 1}
    arms = [Arm(name="a", **own, options=Options(**one)) for one in ({}, {"length": 3}, {"infix": True})]
    arms += [Arm(name="a", **{**own, key: value}) for key, value in {"method": "full", "rows": 5, "epochs": 2}.items()]
    arms.append(Arm(name="a", **own, options=Options(init_text="words: of the task")))
    assert len({arm.setup for arm in arms}) == len(arms)
    assert Arm(name="b", **own, x=3, rate_of="a").setup == arms[0].setup == "prefix-4x1"
    assert arms[-1].setup == "prefix-4x1-init_text_words_of_the_task"


def test_what_is_not_in_a_runs_name_is_in_its_folders(folder: Path, results: Path) -> None:
    study = tiny_study(folder, shared="data", settings={"rows": 7, "base": "/a/b", "methods": ["lora", "full"]})
    assert study.runs.folder == results / "data-base_a_b"
    assert study.full_name == "tiny-base_a_b-methodslora-full-rows7"
    assert tiny_study(folder, settings={"test_inputs": 7}).full_name == "tiny-test-inputs7"


def test_what_takes_long_is_run_first(folder: Path, results: Path) -> None:
    arms = [Arm(name=f"{n} epochs", method="prefix", rows=4, epochs=n, options=Options(length=2)) for n in (2, 3, 1)]
    study = tiny_study(folder, arms=arms, contrasts=[])
    two, three, one = (arm.setup for arm in arms)
    assert [unit.setup for unit in todo(study)] == [three] * 3 + [two] * 3 + [one] * 3
    for arm in arms:
        for i, lr in enumerate(GRIDS["prefix"]):
            study.runs.write(f"{arm.setup}-lr{lr:g}-sample0-seed0", {"lr": lr, "dev_score": i % 2})
    assert [unit.setup for unit in todo(study)] == [three, two, one]
    assert {unit.sample for unit in todo(study)} == {1}


def test_samples_differ_and_repeat() -> None:
    assert sampled(range(50), 5, 0) == sampled(range(50), 5, 0)
    assert sampled(range(50), 5, 0) != sampled(range(50), 5, 1)
    with pytest.raises(SystemExit, match="expected at most 3 training rows; got 4"):
        sampled(range(3), 4, 0)


@pytest.mark.parametrize("name", STUDIES)
def test_the_papers_studies_are_whole(name: str) -> None:
    make, _ = STUDIES[name]
    study = make(options_of([name, *(["--base", "a-base"] if name == "encoder-decoder" else [])]))
    names = [arm.name for arm in study.arms]
    assert len(set(names)) == len(names)
    assert {one for pair in study.contrasts for one in pair} <= set(names)
    assert {arm.rate_of for arm in study.arms} - {None} <= set(names)
    assert all(arm.method in METHODS for arm in study.arms)
    assert study.cut
    if name != "defaults":  # the paper says nothing of it
        assert study.published
        assert study.differs


def test_first_rates_are_lower_with_few_rows() -> None:
    found: dict[str, str | None] = {}
    for name, *flags in (["e2e-lowdata", "--starts", "rows", "words"], ["summarization"]):
        make, _ = STUDIES[name]
        found |= {f"{name} {arm.name}": arm.grid for arm in make(options_of([name, *flags])).arms}
    assert {name for name, grid in found.items() if grid == "prefix-few"} == {
        *(f"e2e-lowdata prefix {rows}" for rows in (50, 100)),
        *(f"e2e-lowdata prefix from words {rows}" for rows in (50, 100, 200, 500)),
        *(f"summarization prefix {rows}" for rows in (100, 400)),
    }
    assert {name for name, grid in found.items() if grid == "full-many"} == {"summarization fine-tuning 1600"}
    assert set(found.values()) == {"prefix-few", "full-many", None}
    assert max(GRIDS["prefix-few"]) <= min(GRIDS["prefix"])
    assert min(GRIDS["full-many"]) > min(GRIDS["full"])


@pytest.mark.parametrize("name", ["webnlg", "summarization"])
def test_a_report_tells_the_words_that_its_prefixes_start_from(name: str) -> None:
    make, _ = STUDIES[name]
    study = make(options_of([name]))
    for arm in study.arms:
        words = arm.options.init_text
        assert (words is not None) == (arm.method == "prefix")
        assert words is None or repr(words) in study.cut


def test_a_table_pretrains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmarks.bart, "pretrain", lambda *_, **__: pytest.fail("it pretrains"))
    make, _ = STUDIES["encoder-decoder"]
    study = make(options_of(["encoder-decoder", "--table", "--bart-minutes", "7"]))
    assert study.base == str(tmp_path / "benchmarks" / "bart-debian-7-minutes")
    assert not list(tmp_path.iterdir())


def test_flags_of_the_paper() -> None:
    make, _ = STUDIES["webnlg"]
    study = make(options_of(["webnlg", "--rows", "70", "--seeds", "3", "--test", "some/test"]))
    assert study.full_name == "webnlg-rows70-testsome_test"
    assert (study.seeds, study.arms[0].rows) == (3, 70)
    make_low, _ = STUDIES["e2e-lowdata"]
    few = make_low(options_of(["e2e-lowdata", "--sizes", "50", "500"]))
    assert few.full_name == "e2e-lowdata-sizes50-500"  # a part does not replace the whole
    assert few.runs.folder == make_low(options_of(["e2e-lowdata"])).runs.folder
    make_ways, _ = STUDIES["baselines"]
    lora = make_ways(options_of(["baselines", "--methods", "lora"]))
    assert (lora.full_name, lora.runs.folder) == ("baselines-methodslora", few.runs.folder)
    assert [arm.method for arm in lora.arms] == ["lora"]
    for starts, kinds in {
        (): ("prefix from words", "fine-tuning"),
        ("--starts", "rows", "words"): ("prefix", "prefix from words", "fine-tuning"),
    }.items():
        few = make_low(options_of(["e2e-lowdata", "--sizes", "50", "500", *starts]))
        assert [arm.name for arm in few.arms] == [f"{kind} {size}" for kind in kinds for size in (50, 500)]
        words = {arm.name for arm in few.arms if arm.options.init_text is not None}
        assert words == {"prefix from words 50", "prefix from words 500"}
    assert {arm.rate_of for arm in few.arms} == {None}  # each size has its own
    with pytest.raises(SystemExit):
        options_of(["ablations", "--processes", "0"])
    with pytest.raises(SystemExit):
        options_of(["ablations", "--test", "folder"])
    with pytest.raises(SystemExit):
        options_of(["baselines", "--methods", "adapters"])


@pytest.mark.slow
def test_the_command_makes_a_table_from_nothing(folder: Path, tmp_path: Path) -> None:
    """By processes of its own; a copy of the benchmarks has results of its own."""
    shutil.copytree(Path(benchmarks.study.__file__).parent, tmp_path / "benchmarks", ignore=lambda *_: ["results"])
    for name, count in {"train": 150, "dev": 5}.items():
        rows = [{"document": f"{name} {i} is {i % 7}", "summary": f"{i % 7} is odd"} for i in range(count)]
        write_jsonl(tmp_path / "data" / "debian-synopsis" / f"{name}.jsonl", rows)
    sizes = ["--sizes", "100", "--dev", "3", "--test-inputs", "5", "--length", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.paper", "summarization", "--base", str(folder), *sizes],
        cwd=tmp_path,
        env={**os.environ, "FOREWORD_DATA": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "| prefix 100 – fine-tuning 100 | all | 1 |" in ended.stdout
    assert "Unfinished" not in ended.stdout
    made = [path for path in (tmp_path / "benchmarks" / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in made} == {".json", ".md", ".svg"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e2e-lowdata", "webnlg", "ablations", "summarization", "baselines", "defaults"])
def test_the_papers_rows_are_apart(name: str, data_folder: Path) -> None:
    make, _ = STUDIES[name]
    study = make(options_of([name]))
    for arm in study.arms[:4]:
        first, second = (study.data(sample, arm.rows) for sample in (0, 1))
        assert len(first.train) == arm.rows
        assert list(first.train) != list(second.train)
        assert [one.input for one in first.test] == [one.input for one in second.test]
        trained = {row["input"] for row in first.train}
        assert not trained & {one.input for one in [*first.dev, *first.test]}
        assert not {one.input for one in first.dev} & {one.input for one in first.test}


# benchmarks that are not studies


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_base_of_a_shape_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = base_of("llama", dtype=torch.bfloat16)
    monkeypatch.setattr(foreword, "load_base", lambda *_, **__: small)
    kind, sizes = shapes.SHAPES[name]
    # the same proportions, but for the heads, which are as many
    least = {key: size // 16 if size >= 512 else size for key, size in sizes.items()}
    monkeypatch.setitem(shapes.SHAPES, name, (kind, least))
    base = shapes.load(name, dtype="bfloat16")
    assert (base.name, base.dtype, base.tokenizer) == (name, torch.bfloat16, small.tokenizer)
    assert len(base.embeddings) == len(small.embeddings)
    assert (base.pad_id, base.end_id) == (small.pad_id, small.end_id)
    rows = rows_of(base, RECORDS, Framing(), length=3)
    step = train_vs_peft.step_of("foreword", base, 3, rows, "direct")
    before = base.model.get_parameter("foreword.p_theta.decoder").clone()
    step(rows[:3])
    if base.is_encoder_decoder:
        with pytest.raises(SystemExit, match=f"decoder-only base on the side full; '{name}' has an encoder"):
            train_vs_peft.step_of("full", base, 3, rows, "direct")
    assert not torch.equal(base.model.get_parameter("foreword.p_theta.decoder"), before)


def test_a_row_of_train_speed_is_told_by_all_that_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = tmp_path / "speed.json", []

    def measure(command: list[str], **_: Any) -> Any:
        asked.append(command)
        limits = ("limit_tokens_per_second", "limit_without_sharing")
        figures = ("tokens_per_second", "rows_per_second", "peak_mib", "loaded_mib", *limits)
        return SimpleNamespace(returncode=0, stdout=json.dumps(dict.fromkeys(figures, 1.0)))

    def new(*flags: str) -> int:
        asked.clear()
        usual = ("--quick", "--device", "cpu", "--rounds", "1", "--json", str(file))
        monkeypatch.setattr(sys, "argv", ["train_speed", *usual, *flags])
        train_speed.main()
        return len(asked)

    monkeypatch.setattr(train_vs_peft.subprocess, "run", measure)
    assert new() == 3
    (result,) = json.loads(file.read_text())["results"]
    # as files were once: one machine for all rows
    machine = {**result.pop("machine"), "torch": "of old"}
    file.write_text(json.dumps({"machine": machine, "results": [result]}))
    assert new() == 0
    assert new("--base", "another") == 3
    assert new("--rounds", "2") == 6
    grid = ("--rows", "e2e", "--batches", "16", "--lengths", "10", "--dtypes", "bfloat16")
    monkeypatch.setattr(sys, "argv", ["train_speed", *grid, "--device", "cpu", "--rounds", "1", "--json", str(file)])
    asked.clear()
    train_speed.main()
    assert len(asked) == 5, "a quick row is not one of the full grid"
    results = json.loads(file.read_text())["results"]
    assert [one["machine"]["torch"] for one in results] == ["of old", *[torch.__version__] * 3]
    file.write_text(json.dumps({"machine": {**machine, "processor": "another"}, "results": [result]}))
    assert new() == 3


def test_a_side_is_held_against_both_limits() -> None:
    common = {"rows_per_second": 2.0, "loaded_mib": 1.0}
    ours = {
        "tokens_per_second": 60.0,
        "peak_mib": 50.0,
        "limit_tokens_per_second": 100.0,
        "limit_without_sharing": 80.0,
    }
    theirs = {
        "tokens_per_second": 20.0,
        "peak_mib": 80.0,
        "limit_tokens_per_second": 90.0,
        "limit_without_sharing": 70.0,
    }
    median = {"foreword": {**common, **ours}, "peft": {**common, **theirs}}
    result = {"median": median, "rounds": dict.fromkeys(["foreword", "peft", "full"])}
    lines = [dict(zip(train_vs_peft.COLUMNS, line, strict=True)) for line in train_vs_peft.lines_of(result)]
    assert [(line["of the limit"], line["without sharing"]) for line in lines] == [
        ("60%", "75%"),
        ("20%", "25%"),
        ("", ""),
    ]
    assert [line["foreword is faster by"] for line in lines] == ["", "3.00", ""]
    assert lines[1]["foreword's memory"] == "0.62"
    assert lines[2]["tokens/s"] == "out of memory"
    for side in median.values():
        del side["limit_without_sharing"]  # as results of old
    lines = [dict(zip(train_vs_peft.COLUMNS, line, strict=True)) for line in train_vs_peft.lines_of(result)]
    assert [(line["of the limit"], line["without sharing"]) for line in lines] == [("60%", ""), ("20%", ""), ("", "")]


def test_a_side_of_users_help_is_told_by_all_that_makes_it(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    facts = users_help.facts_of("own-warm")
    for changed, is_done in (
        ({}, True),
        ({"start": None}, False),
        ({"start": {**facts["start"], "epochs": 7}}, False),
        ({"framing": {**facts["framing"], "max_input_tokens": 41}}, False),
        ({"settings": {**facts["settings"], "lr": 1.0}}, False),
    ):
        runs.write("own-warm", {"side": "own-warm", **facts, **changed})
        assert (users_help.done(runs, "own-warm") is not None) is is_done, changed
    del facts["start"], facts["settings"]["infix"]  # as results of old
    runs.write("own-warm", {"side": "own-warm", **facts})
    assert users_help.done(runs, "own-warm") is not None
    assert users_help.done(runs, "own") is None


# the small BART


def test_corruption_keeps_what_it_does_not_mask() -> None:
    rng = random.Random(0)
    sentences = [list(range(100 * i, 100 * i + 37)) for i in range(1, 4)]
    kept = []
    for _ in range(200):
        out = corrupt(sentences, rng)
        assert (out[0], out[-1]) == (BOS, EOS)
        words = [token for token in out[1:-1] if token != MASK]
        assert len(set(words)) == len(words)
        for sentence in sentences:
            mine = [token for token in words if token in sentence]
            assert mine == sorted(mine)
        kept.append(len(words) / 111)
    assert 0.66 < sum(kept) / len(kept) < 0.8
    assert any(corrupt(sentences, rng)[1] > 200 for _ in range(20)), "the sentences are never in another order"


def test_pretraining_is_gone_on_with_and_gives_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["a package for", "the library", "of tools", "reads mail.", "It is small.", "Documents are here:"]
    texts = [" ".join(random.Random(i).choices(words, k=9)) for i in range(60)]
    monkeypatch.setattr(benchmarks.bart, "documents", lambda limit: texts)
    monkeypatch.setattr(benchmarks.bart, "HELD_OUT", 7)
    real_tokenizer = benchmarks.bart.train_tokenizer
    monkeypatch.setattr(benchmarks.bart, "train_tokenizer", lambda texts: real_tokenizer(texts, 300))
    config = BartConfig(
        **{"vocab_size": 300, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 13},
        **{"decoder_ffn_dim": 13, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"max_position_embeddings": 300, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        **{"decoder_start_token_id": 2, "forced_eos_token_id": 2},
    )
    real, calls = benchmarks.bart.save_checkpoint, 0

    def save(*arguments: Any) -> None:
        nonlocal calls
        real(*arguments)
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks.bart, "save_checkpoint", save)
    folder = tmp_path / "bart"
    with pytest.raises(KeyboardInterrupt):
        pretrain(folder, minutes=0.02, config=config, every=0.1)
    assert not folder.exists()
    state = torch.load(tmp_path / "bart.unfinished" / "checkpoint.pt", weights_only=True)["state"]
    assert pretrain(folder, minutes=0.02, config=config, every=0.1) == folder
    facts = json.loads((folder / "pretraining.json").read_text("utf-8"))
    assert facts["step"] > state["step"] > 0
    assert facts["curve"][: len(state["curve"])] == state["curve"]
    assert facts["curve"][-1]["held_out_loss"] < facts["curve"][0]["held_out_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bart"]
    base = load_base(folder)
    assert list(base.shapes) == ["encoder", "decoder", "cross"]
    row = rows_of(base, [{"input": "a package", "output": "the library"}], Framing(template="{input}"))[0]
    assert (row.x[0], row.x[-1], row.y[0], row.y[-1]) == (BOS, EOS, BOS, EOS)
    monkeypatch.setattr(benchmarks.bart, "documents", lambda limit: pytest.fail("it is there"))
    pretrain(folder, minutes=0.02)
