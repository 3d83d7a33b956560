"""Does a prefix of one's own help? 44 teams that write synopses of Debian packages, 40 training rows each, 10 to be told.

    python -m benchmarks.users_help              # runs what is not yet in benchmarks/results/users_help, then the table
    python -m benchmarks.users_help --table      # the table and the plot alone

Sides: the bare base; one prefix shared by all teams, trained on all rows; a prefix a team, trained on that team's rows
alone; the same, started from the shared one; both of these at a quarter of the learning rate (`slow`), and with keys
and values trained directly, without an MLP; and a prefix a team that starts from words of the task, at a quarter and a
sixteenth of the rate. Of each, on rows that nobody trained on: ROUGE-L (rouge-score, F1) and mean
loss of the synopses, each a mean over the teams of a team's mean; and the share of house features kept, over the teams
that have any. A house feature is one that at least 80% of a team's training rows agree on: the case of the first
letter, the opening words (the most that agree), the last words, and the form of the end, " - ...", " -- ..." or
"(...)". Intervals are 95%, from drawing teams with replacement.

Every side is one JSON file, written when it is done; one of other settings is made anew. Another base or dtype has a folder
of its own, named after it. Within a side, `foreword.train` resumes from its checkpoint and `foreword.train_many` skips the teams that are in its store; both lie in
--work.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import foreword
from benchmarks.e2e_rows import DATA
from benchmarks.record import machine
from benchmarks.runs import Runs, named
from foreword.attach import Stack, attach
from foreword.bases import Base
from foreword.data import rows_of
from foreword.evaluate import score
from foreword.loss import mean_loss
from foreword.many import UserFile, train_many
from foreword.prefix import Framing, Prefix
from foreword.store import Store
from foreword.writing import write_jsonl

RESULTS = Path(__file__).with_name("results")
USUAL = {"base": "smollm2-135m", "dtype": "float32"}
"""With another base or dtype the folder of the results is named after it."""
FRAMING = Framing(template="{input}\n\nOne-line summary:", max_input_tokens=40)
AGREE = 0.8
DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Side:
    """How the prefixes of one side are trained, beside the defaults of `TrainSettings`.

    Args:
        own: one a team, not one for all.
        warm: started from the shared one.
        epochs, batch_size, reparametrization, lr, init_text: see `TrainSettings`.
    """

    own: bool
    warm: bool = False
    reparametrization: Literal["mlp", "direct"] = "mlp"
    lr: float | None = None
    epochs: int
    batch_size: int = 4
    init_text: str | None = None


WORDS = "Write a one-line summary of a software package:"

SIDES: dict[str, Side | None] = {
    "bare": None,
    "shared": Side(own=False, epochs=2, batch_size=16),
    "own": Side(own=True, epochs=4),
    "own-warm": Side(own=True, warm=True, epochs=2),
    "own-slow": Side(own=True, epochs=4, lr=2.5e-4),
    "own-warm-slow": Side(own=True, warm=True, epochs=2, lr=2.5e-4),
    "own-direct": Side(own=True, epochs=4, reparametrization="direct"),
    "own-warm-direct": Side(own=True, warm=True, epochs=2, reparametrization="direct"),
    "own-words": Side(own=True, epochs=4, lr=2.5e-4, init_text=WORDS),
    "own-words-slow": Side(own=True, epochs=4, lr=6.25e-5, init_text=WORDS),
}


# house features


Feature = Callable[[str], bool]


def house_features(texts: Sequence[str]) -> dict[str, Feature]:
    """What at least 80% of a team's texts have in common, by name."""

    def agreed(name: str, feature: Feature) -> dict[str, Feature]:
        return {name: feature} if sum(map(feature, texts)) >= AGREE * len(texts) else {}

    found = agreed("first letter upper", lambda text: text[:1].isupper())
    found |= agreed("first letter lower", lambda text: text[:1].islower())
    for name, pattern in (("ends - ...", r"\S - \S"), ("ends -- ...", r"\S -- \S"), ("ends (...)", r"\)$")):
        found |= agreed(name, lambda text, pattern=pattern: re.search(pattern, text) is not None)  # type: ignore[misc]
    for name, part in (("opens", lambda words, n: words[:n]), ("closes", lambda words, n: words[-n:])):
        longest: dict[str, Feature] = {}
        for n in range(1, max(len(text.split()) for text in texts) + 1):
            parts = Counter(tuple(part(text.split(), n)) for text in texts if len(text.split()) >= n)
            words = parts.most_common(1)[0][0]
            longest = (
                agreed(
                    f"{name} {' '.join(words)!r}",
                    lambda text, words=words, n=n, part=part: tuple(part(text.split(), n)) == words,  # type: ignore[misc]
                )
                or longest
            )
        found |= longest
    return found


# the data


def team_rows(name: str) -> dict[str, list[dict[str, str]]]:
    """Each team's rows, "input" and "output"; y begins with a space, as text after a colon does."""
    rows: dict[str, list[dict[str, str]]] = {}
    with (DATA / "debian-synopsis" / f"{name}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            raw = json.loads(line)
            row = {"user": raw["user"], "input": raw["document"], "output": f" {raw['summary']}"}
            rows.setdefault(raw["user"], []).append(row)
    return rows


# training and generating


def shared_prefix(base: Base, work: Path) -> Prefix:
    out, settings = work / "shared.safetensors", settings_of("shared")
    wanted = {**asdict(settings), "lr": settings.peak_lr}
    del wanted["init_text"]  # a card has none
    finished = out.exists() and not out.with_name(f"{out.name}.checkpoint").exists()
    if not finished or not wanted.items() <= Prefix.load(out).card.training.items():
        rows = [row for own in team_rows("users-train").values() for row in own]
        began = time.perf_counter()

        def tell(progress: foreword.TrainingProgress) -> None:
            if progress.step % 10 == 0:
                print(
                    f"shared: step {progress.step} of {progress.steps}, loss {progress.loss:.3f}, "
                    f"{progress.tokens_per_second:.0f} tokens/s, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )

        foreword.train(
            base, rows, settings=settings, framing=FRAMING, out=out, resume=True, overwrite=True, checkpoint_every=20,
            save_dtype=torch.float32, on_step=tell,
        )  # fmt: skip
    return Prefix.load(out, base)


def settings_of(name: str) -> foreword.TrainSettings:
    side = SIDES[name]
    assert side is not None
    return foreword.TrainSettings(
        epochs=side.epochs,
        batch_size=side.batch_size,
        reparametrization=side.reparametrization,
        lr=side.lr,
        init_text=side.init_text,
    )


def own_prefixes(base: Base, work: Path, name: str, warm: bool) -> dict[str, Prefix]:
    """A prefix a team, by the team's name."""
    data = work / "users-train.jsonl"
    write_jsonl(data, (row for own in team_rows("users-train").values() for row in own))
    store = Store(work / name, create=True)
    start = shared_prefix(base, work) if warm else None
    began = time.perf_counter()
    for report in train_many(
        base, UserFile(data), store, settings=settings_of(name), framing=FRAMING, init_from=start, slots=8,
        rows_at_once=16, save_dtype=torch.float32,
    ):  # fmt: skip
        assert report.error is None, report
        print(f"{name}: {json.dumps(report.to_dict())}, {time.perf_counter() - began:.0f} s", flush=True)
    return {team: store.get(team, base=base) for team in team_rows("users-train")}


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next(filter(None, map(str.strip, text.splitlines())), "")


def dev_loss(base: Base, prefix: Prefix | None, records: Sequence[Mapping[str, str]]) -> float:
    rows = rows_of(base, records, FRAMING, length=0 if prefix is None else prefix.length)
    stack = Stack.of([prefix or own_nothing(base)], device=base.device, dtype=base.dtype)
    with attach(base.model, stack) as attachment:
        if prefix is None:
            attachment.rows = torch.tensor([-1])
        return mean_loss(base, rows, attachment)


def own_nothing(base: Base) -> Prefix:
    """A prefix that no row has: the bare base, looked at in the same way."""
    from foreword.reparam import trainable_prefix

    card = foreword.Card(base=base.name, fingerprint=base.fingerprint)
    return trainable_prefix(base, length=1, reparametrization="direct").fold(card)


def facts_of(name: str) -> dict[str, Any]:
    """What makes a side what it is; a result of anything else is not of this side."""
    side = SIDES[name]
    return {
        "settings": None if side is None else asdict(settings_of(name)),
        "start": asdict(settings_of("shared")) if side and side.warm else None,
        "framing": asdict(FRAMING),
    }


def agrees(told: Any, wanted: Any) -> bool:
    """Whether what is told is as wanted; results of old do not tell all."""
    if isinstance(told, Mapping) and isinstance(wanted, Mapping):
        return all(agrees(value, wanted[key]) for key, value in told.items() if key in wanted)
    return bool(told == wanted)


def done(runs: Runs, name: str) -> dict[str, Any] | None:
    result = runs.get(name)
    return result if result and agrees(result, facts_of(name)) else None


def run(base: Base, work: Path, name: str) -> dict[str, Any]:
    side = SIDES[name]
    began = time.perf_counter()
    dev = team_rows("users-dev")
    prefixes: dict[str, Prefix | None]
    if side is None:
        prefixes = dict.fromkeys(dev)
    elif side.own:
        prefixes = dict(own_prefixes(base, work, name, side.warm))
    else:
        prefixes = dict.fromkeys(dev, shared_prefix(base, work))
    flat = [(team, row) for team, rows in dev.items() for row in rows]
    texts = foreword.generate(
        base, [row for _, row in flat], [prefixes[team] for team, _ in flat], framing=FRAMING,
        settings=foreword.GenerateSettings(max_new_tokens=32, batch_size=32),
    )  # fmt: skip
    outputs: dict[str, list[str]] = {}
    for (team, _), text in zip(flat, texts, strict=True):
        outputs.setdefault(team, []).append(first_line(text))
    return {
        "side": name, **facts_of(name), "base": base.name, "dtype": str(base.dtype), "machine": machine(base.device), "seconds": time.perf_counter() - began,
        "train_loss": {team: prefix.card.metrics["train_loss"] for team, prefix in prefixes.items() if prefix},
        "dev_loss": {team: dev_loss(base, prefix, dev[team]) for team, prefix in prefixes.items()},
        "outputs": outputs,
    }  # fmt: skip


# what came out


def figures(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By kind and team."""
    train, dev = team_rows("users-train"), team_rows("users-dev")
    found: dict[str, dict[str, float]] = {"ROUGE-L": {}, "house features kept": {}, "dev loss": result["dev_loss"]}
    for team, outputs in result["outputs"].items():
        references = [[row["output"].strip()] for row in dev[team]]
        found["ROUGE-L"][team] = 100 * score(references, outputs, "ROUGE-L").figures["ROUGE-L"]
        features = house_features([row["output"].strip() for row in train[team]])
        if features:
            kept = [feature(text) for feature in features.values() for text in outputs]
            found["house features kept"][team] = 100 * sum(kept) / len(kept)
    return found


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over teams; teams are drawn anew for the interval, the same draws for every side."""
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(np.asarray(values)[drawn].mean(axis=1), [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def report(runs: Runs, console: Console) -> None:
    found = {name: figures(result) for name in SIDES if (result := done(runs, name))}
    if not found:
        return
    teams = {kind: len(values) for kind, values in next(iter(found.values())).items()}
    view = Table("side", *(f"{kind} ({count} teams)" for kind, count in teams.items()))
    summary: dict[str, Any] = {"means": {}, "against shared": {}}
    for name, kinds in found.items():
        summary["means"][name] = {kind: mean_and_interval([*values.values()]) for kind, values in kinds.items()}
        view.add_row(name, *(_shown(*figure) for figure in summary["means"][name].values()))
    for name in [name for name in found if name != "shared"] if "shared" in found else []:
        summary["against shared"][name] = {
            kind: mean_and_interval([value - found["shared"][kind][team] for team, value in values.items()])
            for kind, values in found[name].items()
        }
        shown = (_shown(*figure, sign="+") for figure in summary["against shared"][name].values())
        view.add_row(f"{name} - shared", *shown)
    console.print(view)
    left = [name for name in SIDES if name not in found]
    if left:
        console.print(f"not there yet: {', '.join(left)}")
    features = {
        team: list(house_features([row["output"].strip() for row in rows]))
        for team, rows in team_rows("users-train").items()
    }
    summary["house features"] = {team: names for team, names in features.items() if names}
    runs.write("summary", summary)
    plot(runs.folder, summary["means"], teams)


def _shown(mean: float, low: float, high: float, *, sign: str = "") -> str:
    digits = 2 if abs(mean) >= 10 or abs(high) >= 10 else 3
    return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def plot(folder: Path, means: Mapping[str, Mapping[str, tuple[float, float, float]]], teams: Mapping[str, int]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "foreword"  # the same figures are the same file
    figure, axes = pyplot.subplots(1, len(teams), figsize=(10, 0.6 + 0.5 * len(means)), sharey=True)
    for axis, (kind, count) in zip(axes, teams.items(), strict=True):
        for place, name in enumerate(means):
            mean, low, high = means[name][kind]
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="black", capsize=3)
        axis.set_title(f"{kind}, {count} teams" + (", %" if "kept" in kind else ""), fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(means)), list(means))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "users_help.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--dtype", help="of the base")
    parser.add_argument("--device")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--work", type=Path, default=Path("out/users_help"), help="prefixes and checkpoints")
    parser.add_argument("--table", action="store_true")
    parser.set_defaults(**USUAL)
    options = parser.parse_args()
    changed = {flag: getattr(options, flag) for flag, usual in USUAL.items() if getattr(options, flag) != usual}
    runs = Runs(RESULTS / named("users_help", changed))
    if not options.table:
        work = options.work / named(options.dtype, {flag: value for flag, value in changed.items() if flag != "dtype"})
        work.mkdir(parents=True, exist_ok=True)
        base = foreword.load_base(options.base, dtype=options.dtype, device=options.device)
        for name in options.sides:
            if done(runs, name) is None:
                runs.write(name, run(base, work, name))
    report(runs, Console(width=160))


if __name__ == "__main__":
    main()
