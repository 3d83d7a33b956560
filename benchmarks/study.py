"""A study: arms that are trained on the same rows with the same budget, and what comes of it.

An arm's learning rate is chosen with the first sample and seed, by the rule of `runs.best_rate`, on development data; then
every sample and seed is run. `report` writes NAME.md, NAME.json and NAME.svg, finished or not; what is missing is said.
"""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import foreword
from benchmarks.methods import GRIDS, METHODS, Options, attached_texts, fit
from benchmarks.record import machine
from benchmarks.runs import Runs, best_rate, named
from foreword.data import rows_of
from foreword.evaluate import Scores, paired_bootstrap, score, score_groups
from foreword.generation import GenerateSettings
from foreword.prefix import Framing
from foreword.tasks import Example

RESULTS = Path(__file__).with_name("results")
NOT_IN_A_FOLDER = ("rows", "epochs", "length", "sizes", "starts", "methods")
"""Flags that are in the name of a run, or choose arms; the others are in the name of the runs' folder."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What one sample is trained and tried on.

    Args:
        train: records.
        dev: what learning rates are chosen on.
        test: what is reported, the same for every sample.
        groups: by name, places among `test`, such as seen and unseen categories; `all` is always there.
    """

    train: Sequence[Mapping[str, Any]]
    dev: Sequence[Example]
    test: Sequence[Example]
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A line of the table.

    Args:
        name: of the line.
        method: a name in METHODS; its learning rates are those of GRIDS under `grid` or, by default, the method.
        rows: training rows.
        epochs: passes over them.
        options: for the method.
        rate_of: the arm whose chosen learning rate is taken. Default: its own is chosen.
        line, x: of a curve in the plot, if it is a point of one.
    """

    name: str
    method: str
    rows: int
    epochs: int
    options: Options = field(default_factory=Options)
    grid: str | None = None
    rate_of: str | None = None
    line: str | None = None
    x: float | None = None

    @property
    def setup(self) -> str:
        """What is run, whatever study it is for: method, rows, epochs, and the options that are not the usual ones."""
        usual = dataclasses.asdict(Options())
        own = (f"-{key}_{value}" for key, value in dataclasses.asdict(self.options).items() if value != usual[key])
        return slug(f"{self.method}-{self.rows}x{self.epochs}{''.join(own)}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """See the module.

    Args:
        name: of the files.
        shared: of the runs' folder. Studies with the same data, framing and ways to generate share one, so that what is a
            run of both is made once. Default: the study's name.
        title: of the report.
        base: as `load_base` takes it.
        arms: the lines.
        data: gives `Data` for (sample, rows); the test data may not depend on them.
        metrics: as `score` takes them; `primary` is one of their figures, for choosing and for plots.
        contrasts: pairs of arms, compared by a paired bootstrap, the second against the first.
        samples, seeds: of training rows, and of all else that is random.
        batch_size: rows a step.
        framing, new_tokens, beams: how outputs are generated.
        cut: what the report says of the default size.
        published: the paper's figures: a name, then figures by name.
        differs: what is not as in the paper.
        expected: what the paper lets us expect.
        x_label: of the plot.
        settings: what was changed from the defaults, by flag; it names the files.
    """

    name: str
    title: str
    base: str
    arms: Sequence[Arm]
    data: Callable[[int, int], Data]
    metrics: str
    primary: str
    contrasts: Sequence[tuple[str, str]] = ()
    samples: int = 1
    seeds: int = 1
    batch_size: int = 8
    framing: Framing = field(default_factory=Framing)
    new_tokens: int = 80
    max_output_tokens: int | None = None
    beams: int = 1
    dtype: str | None = None
    device: str | None = None
    cut: str = ""
    published: Sequence[tuple[str, Mapping[str, float]]] = ()
    differs: str = ""
    expected: Sequence[str] = ()
    x_label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: str | None = None

    @property
    def full_name(self) -> str:
        return named(self.name, self.settings)

    @property
    def runs(self) -> Runs:
        rest = {flag: value for flag, value in self.settings.items() if flag not in NOT_IN_A_FOLDER}
        return Runs(RESULTS / named(self.shared or self.name, rest))

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def with_setup(self, setup: str) -> Arm:
        return next(arm for arm in self.arms if arm.setup == setup)


class Unit(NamedTuple):
    """One run."""

    setup: str
    lr: float
    sample: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setup}-lr{self.lr:g}-sample{self.sample}-seed{self.seed}"


def slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def tried(study: Study, arm: Arm) -> dict[float, float]:
    """Development scores by learning rate, of those that the arm's is chosen from."""
    if arm.rate_of is not None:
        return tried(study, study.arm(arm.rate_of))
    return {r["lr"]: r["dev_score"] for r in study.runs.matching(f"{arm.setup}-lr*-sample0-seed0")}


def rate(study: Study, arm: Arm) -> tuple[float | None, list[float]]:
    """The arm's learning rate, or None and those to try next."""
    if arm.rate_of is not None:
        return rate(study, study.arm(arm.rate_of))[0], []
    return best_rate(tried(study, arm), GRIDS[arm.grid or arm.method])


def check_one_base(study: Study, *fingerprints: str) -> None:
    """An error where the runs, and those with these fingerprints, are not all of one base. Files of old do not tell theirs."""
    told = {r["fingerprint"] for r in study.runs.matching("*") if "fingerprint" in r} | {*fingerprints}
    if len(told) > 1:
        found = ", ".join(sorted(one[:8] for one in told))
        raise SystemExit(
            f"expected runs of one base in {study.runs.folder.name}; got those with the fingerprints {found}: "
            "go on with the base they were begun with, or move them away"
        )


def todo(study: Study) -> list[Unit]:
    """What can be run now: learning rates first, then a turn for each arm, so that what is unfinished is so evenly.

    What takes long comes first, so that of several processes none waits long for the last.
    """
    steps = {arm.setup: arm.rows * arm.epochs for arm in study.arms}
    rates, rest = [], []
    for arm in study.arms:
        best, more = rate(study, arm)
        rates += [Unit(arm.setup, lr, 0, 0) for lr in more]
        if best is not None:
            rest += [Unit(arm.setup, best, i, j) for i in range(study.samples) for j in range(study.seeds)]
    left = [unit for unit in rest if study.runs.get(unit.name) is None]
    rates.sort(key=lambda unit: -steps[unit.setup])
    return rates + sorted(left, key=lambda unit: (unit.sample, unit.seed, -steps[unit.setup]))


def run(study: Study, unit: Unit) -> dict[str, Any]:
    """Train and generate; what is kept of it."""
    arm = study.with_setup(unit.setup)
    data = study.data(unit.sample, arm.rows)
    base = foreword.load_base(study.base, dtype=study.dtype, device=study.device)
    fingerprint = base.fingerprint  # before fine-tuning changes it
    check_one_base(study, fingerprint)
    options = dataclasses.replace(arm.options, seed=unit.seed)
    length = 0 if arm.method in ("full", "top2", "lora") else options.length
    rows = rows_of(base, data.train, study.framing, length=length, max_output_tokens=study.max_output_tokens)
    learner = METHODS[arm.method](base, rows, options)
    fitted = fit(base, learner, rows, lr=unit.lr, epochs=arm.epochs, batch_size=study.batch_size, seed=unit.seed)
    diverged = fitted.loss == float("inf")
    result = {
        **unit._asdict(),
        **{"rows": len(rows), "epochs": arm.epochs, "parameters": learner.kept, "dtype": str(base.dtype)},
        **{"fingerprint": fingerprint, "batch_size": study.batch_size, "machine": machine(base.device)},
        **{"train_seconds": fitted.seconds, "tokens": fitted.tokens, "diverged": diverged},
    }
    if diverged:
        print(f"{unit.name}: diverged", flush=True)
        return {**result, "train_loss": None, "dev_score": 0.0, "test_score": 0.0, "test_outputs": None}
    prefix = learner.finish()
    settings = GenerateSettings(max_new_tokens=study.new_tokens, num_beams=study.beams, batch_size=25)

    def texts(examples: Sequence[Example]) -> list[str]:
        inputs = [one.input for one in examples]
        if learner.attached:
            found = attached_texts(base, inputs, settings=settings, framing=study.framing)
        else:
            found = foreword.generate(base, inputs, prefix, settings=settings, framing=study.framing)
        return [" ".join(text.split()) for text in found]

    began = time.perf_counter()
    dev, test = texts(data.dev), texts(data.test)
    result |= {
        "train_loss": fitted.loss,
        "dev_score": figure(study, data.dev, dev),
        "test_score": figure(study, data.test, test),
        "generate_seconds": time.perf_counter() - began,
        "test_outputs": test,
    }
    print(
        f"{unit.name}: loss {fitted.loss:.3f}, {study.primary} dev {result['dev_score']:.4f} "
        f"test {result['test_score']:.4f}, {fitted.seconds:.0f} s of training",
        flush=True,
    )
    return result


def figure(study: Study, examples: Sequence[Example], outputs: Sequence[str]) -> float:
    name = study.primary
    (value,) = score([one.references for one in examples], outputs, name).figures.values()
    return value


@dataclass(frozen=True, kw_only=True)
class Line:
    """What an arm came to.

    Args:
        lr: the learning rate that was chosen.
        edge: it is at the edge of those tried.
        parameters: numbers that a task keeps.
        runs: those that did not diverge.
        diverged: how many did.
        scores: by group, of the runs' outputs together; without figures if all diverged.
    """

    arm: Arm
    lr: float
    edge: bool
    parameters: int
    runs: Sequence[Mapping[str, Any]]
    diverged: int
    scores: Mapping[str, Scores]

    @property
    def values(self) -> list[float]:
        return [run["test_score"] for run in self.runs]


def lines(study: Study, *, samples: int = 1000) -> list[Line]:
    """The arms of which there are runs at the chosen learning rate, with figures of all those runs' outputs together."""
    check_one_base(study)
    found = []
    for arm in study.arms:
        lr, _ = rate(study, arm)
        if lr is None:
            continue
        made = [
            result
            for i in range(study.samples)
            for j in range(study.seeds)
            if (result := study.runs.get(Unit(arm.setup, lr, i, j).name)) is not None
        ]
        if not made:
            continue
        runs = [result for result in made if not result["diverged"]]
        data = study.data(0, arm.rows)
        groups = {"all": range(len(data.test)), **data.groups}
        scores = {name: Scores(figures={}, signatures={}) for name in groups}
        if runs:
            references = [one.references for one in data.test]
            outputs = [text for run in runs for text in run["test_outputs"]]
            scores = score_groups(references, outputs, groups, study.metrics, runs=len(runs), samples=samples)
        rates = tried(study, arm)
        found.append(
            Line(
                arm=arm,
                lr=lr,
                edge=lr in (min(rates), max(rates)),
                parameters=made[0]["parameters"],
                runs=runs,
                diverged=len(made) - len(runs),
                scores=scores,
            )
        )
    return found


def compare(study: Study, found: Sequence[Line], *, samples: int = 1000) -> list[dict[str, Any]]:
    """The contrasts of which both arms are there, over the runs that both have, for each group of the test data."""
    by_name = {line.arm.name: line for line in found}
    compared = []
    for before, after in study.contrasts:
        runs = [
            {(r["sample"], r["seed"]): r for r in by_name[name].runs} if name in by_name else {}
            for name in (before, after)
        ]
        shared = sorted(runs[0].keys() & runs[1].keys())
        if not shared:
            continue
        data = study.data(0, study.arm(before).rows)
        for group, places in {"all": range(len(data.test)), **data.groups}.items():
            texts = [[own[key]["test_outputs"][i] for key in shared for i in places] for own in runs]
            references = [data.test[i].references for i in places]
            baseline, system = texts
            result = paired_bootstrap(references, baseline, system, study.primary, runs=len(shared), samples=samples)
            (one,) = result.values()
            compared.append(
                {
                    **{"baseline": before, "system": after, "group": group, "metric": study.primary},
                    **{"runs": len(shared), "difference": one.system - one.baseline},
                    **{"interval": list(one.interval), "p_value": one.p_value},
                }
            )
    return compared


def sampled(records: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of the records, another choice for each seed; an error where there are fewer."""
    if count > len(records):
        raise SystemExit(f"expected at most {len(records)} training rows; got {count}")
    return random.Random(seed).sample(list(records), count)
