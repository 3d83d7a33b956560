"""The paper's claims, and ways to tune, as studies: what is trained, on what, and what is compared.

Default sizes are for two cores, two processes of one thread each. Where these are fast in bfloat16, each of the paper's
takes at most 150 minutes with --dtype bfloat16, learning rates included; in float32 up to four hours.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.methods import Options
from benchmarks.paper import data, published
from benchmarks.study import Arm, Study
from foreword.prefix import Framing

E2E_DIFFERS = (
    "the base (SmolLM2-135M-Instruct for GPT-2 medium, 345M); the data (rows of the challenge's development set, split by "
    "meaning representation, since its training set is not at hand; other held-out inputs than the paper's test set); greedy "
    "outputs for beams of 5; no dropout. Figures are 0 to 1 here and 0 to 100 in the paper."
)


FEW, FEW_FROM_WORDS = 100, 500
"""Up to so many rows, the prefix's learning rates that are tried first are lower; where it starts from words, the latter."""

MANY = 1000
"""From so many rows on, fine-tuning's are higher."""

E2E_WORDS = "table-to-text: describe the restaurant"
WEBNLG_WORDS = "table-to-text: describe the facts"
SYNOPSIS_WORDS = "summarize: describe the package in one line"
"""To start a prefix from; the paper's are of this kind (section 7.4)."""

STARTS = {"words": ("prefix from words", E2E_WORDS), "rows": ("prefix", None)}
"""What the prefixes of e2e-lowdata may start from: the line's name, and the words; None is the first rows."""


def _grid(method: str, size: int, options: Options) -> str | None:
    """Which of GRIDS so many rows begin with; None is the method's own."""
    if method == "full":
        return "full-many" if size >= MANY else None
    return "prefix-few" if size <= (FEW if options.init_text is None else FEW_FROM_WORDS) else None


def _curve(
    sizes: Mapping[int, int], options: Namespace, starts: Mapping[str, str | None]
) -> tuple[dict[int, int], list[Arm]]:
    """Prefixes and full fine-tuning by training size, with a learning rate for each.

    Args:
        sizes: epochs by number of rows; those that the user chose are taken.
        starts: for each line of prefixes the words that it starts from; None is the first rows.

    Returns:
        The sizes taken, and the arms.
    """
    chosen = {size: epochs for size, epochs in sizes.items() if options.sizes is None or size in options.sizes}
    if not chosen:
        raise SystemExit(f"expected some of the sizes {', '.join(map(str, sizes))}; got {options.sizes}")
    kinds = {kind: ("prefix", Options(length=options.length, init_text=words)) for kind, words in starts.items()}
    kinds["fine-tuning"] = "full", Options(length=options.length)
    arms = [
        Arm(
            name=f"{kind} {size}",
            method=method,
            grid=_grid(method, size, own),
            rows=size,
            epochs=epochs,
            options=own,
            line=kind,
            x=size,
        )
        for kind, (method, own) in kinds.items()
        for size, epochs in chosen.items()
    ]
    return chosen, arms


def low_data(options: Namespace) -> Study:
    """Prefix against full fine-tuning on few E2E rows (section 6.3, figure 3)."""
    starts = dict(STARTS[start] for start in options.starts)
    chosen, arms = _curve({50: 12, 100: 8, 200: 6, 500: 3}, options, starts)
    return Study(
        name="e2e-lowdata",
        shared="e2e",
        title="E2E with few rows: prefix against full fine-tuning",
        arms=arms,
        data=lambda sample, rows: data.e2e(sample, rows, options.dev, options.test_inputs),
        metrics="e2e",
        primary="e2e.BLEU",
        contrasts=[(f"fine-tuning {size}", f"{kind} {size}") for kind in starts for size in chosen],
        cut=f"samples of rows: {options.samples}, seeds: {options.seeds} (the paper: 5 and 2; --samples 5 --seeds 2); "
        f"{options.test_inputs} test inputs; epochs "
        + ", ".join(f"{epochs} at {size} rows" for size, epochs in chosen.items()),
        published=published.LOW_DATA,
        differs=E2E_DIFFERS,
        expected=["prefix ahead of fine-tuning with few rows, the gap smaller with more"],
        x_label="training rows",
        **common(options),
    )


WAYS = {
    "foreword's prefix": ("prefix", None, Options()),
    "foreword's prefix, no MLP": ("prefix", "prefix-direct", Options(reparametrization="direct")),
    "PEFT's prefix tuning": ("peft-prefix", None, Options()),
    "prompt tuning": ("prompt", None, Options()),
    "LoRA": ("lora", None, Options()),
    "top two layers": ("top2", None, Options()),
    "full fine-tuning": ("full", None, Options()),
}


def baselines(options: Namespace) -> Study:
    """Other ways to tune the same base, on the same data and budget; it shares runs with e2e-lowdata."""
    names = [name for name, (method, _, _) in WAYS.items() if options.methods is None or method in options.methods]
    return Study(
        name="baselines",
        shared="e2e",
        title=f"E2E, {options.rows} rows, {options.epochs} epochs: ways to tune",
        arms=[
            Arm(
                name=name,
                method=method,
                grid=grid,
                rows=options.rows,
                epochs=options.epochs,
                options=dataclasses.replace(own, length=options.length),
            )
            for name in names
            for method, grid, own in [WAYS[name]]
        ],
        data=lambda sample, rows: data.e2e(sample, rows, options.dev, options.test_inputs),
        metrics="e2e",
        primary="e2e.BLEU",
        contrasts=[(name, names[0]) for name in names[1:]],
        cut=f"{options.rows} rows (the challenge: 42,000), seeds: {options.seeds}, {options.test_inputs} test inputs",
        published=published.E2E,
        differs=f"{E2E_DIFFERS} Adapters are missing, since no library for them runs here.",
        **common(options),
    )


def defaults(options: Namespace) -> Study:
    """Are foreword's defaults any good? Against PEFT's prefix tuning; rows of few meaning representations."""
    ours = "foreword's prefix"
    kinds = {
        ours: ("prefix", "prefix-batch16", Options(length=options.length)),
        f"{ours}, no MLP": ("prefix", "prefix-direct", Options(length=options.length, reparametrization="direct")),
        "PEFT's, projected": ("peft-prefix", None, Options(length=options.length)),
        "PEFT's, direct": ("peft-direct", None, Options(length=options.length)),
    }

    return Study(
        name="defaults",
        title=f"E2E, {options.rows} rows, {options.epochs} epochs: foreword's defaults against PEFT's prefix tuning",
        arms=[
            Arm(name=name, method=method, grid=grid, rows=options.rows, epochs=options.epochs, options=own)
            for name, (method, grid, own) in kinds.items()
        ],
        data=lambda sample, rows: data.e2e_of_few(sample, rows, options.dev, options.test_inputs),
        metrics="BLEU",
        primary="BLEU",
        contrasts=[(name, ours) for name in kinds if name != ours],
        batch_size=16,
        cut=f"{options.rows} rows, seeds: {options.seeds}, {options.test_inputs} test inputs",
        **common(options),
    )


def webnlg(options: Namespace) -> Study:
    """Categories that were not trained on (section 6.4, table 1)."""
    plain = Options(length=options.length)
    kinds = {
        "prefix": ("prefix", Options(length=options.length, init_text=WEBNLG_WORDS)),
        "fine-tuning": ("full", plain),
        "top two layers": ("top2", plain),
    }
    arms = [
        Arm(name=name, method=method, rows=options.rows, epochs=options.epochs, options=own)
        for name, (method, own) in kinds.items()
    ]
    held = "the challenge's test set, all ten training categories trained on" if options.test else (
        f"five of the ten training categories held out as unseen ({', '.join(data.HELD_OUT)}), tried on the development set"
    )  # fmt: skip
    return Study(
        name="webnlg",
        title="WebNLG: categories seen and unseen in training",
        arms=arms,
        data=lambda sample, rows: data.webnlg(sample, rows, options.dev, options.test_inputs, options.test),
        metrics="webnlg",
        primary="webnlg.BLEU",
        contrasts=[("fine-tuning", "prefix"), ("top two layers", "prefix")],
        cut=f"{options.rows} rows and {options.epochs} epochs (the paper: 18,000 and 5); {options.test_inputs} test inputs each "
        f"of seen and unseen categories; seeds: {options.seeds}; the prefix starts from {WEBNLG_WORDS!r}",
        published=published.WEBNLG,
        differs=f"the base (SmolLM2-135M-Instruct for GPT-2 medium); the data ({held}); greedy outputs for beams of 5. "
        "No adapters: no library for them runs here, see benchmarks/methods.py. METEOR and TER are 0 to 1.",
        expected=["prefix ahead of fine-tuning on unseen categories, behind or equal on seen ones"],
        new_tokens=100,
        **common(options),
    )


def ablations(options: Namespace) -> Study:
    """What of prefix-tuning matters (section 7)."""

    def arm(name: str, *, rows: int = options.rows, epochs: int = options.epochs, **more: Any) -> Arm:
        own = {
            key: more.pop(key) for key in ("length", "reparametrization", "init", "init_text", "infix") if key in more
        }
        return Arm(name=name, method="prefix", rows=rows, epochs=epochs, options=Options(**own), **more)

    few, few_epochs = 100, 8
    arms = [
        arm("prefix 10", line="prefix", x=10, length=10),
        *(arm(f"prefix {p}", line="prefix", x=p, length=p, rate_of="prefix 10") for p in (1, 5, 20, 40)),
        arm(
            "embedding-only 10",
            line="embedding-only",
            x=10,
            length=10,
            reparametrization="embedding",
            grid="prefix-embedding",
        ),
        *(
            arm(
                f"embedding-only {p}",
                line="embedding-only",
                x=p,
                length=p,
                reparametrization="embedding",
                rate_of="embedding-only 10",
            )
            for p in (1, 20)
        ),
        *(arm(f"infix {p}", line="infix", x=p, length=p, infix=True, rate_of="prefix 10") for p in (1, 10, 20)),
        arm("no mlp 10", reparametrization="direct", grid="prefix-direct", line="no mlp", x=10),
        arm("random start 10", init="random", rate_of="prefix 10", line="random start", x=10),
        *(
            arm(f"{few} rows, {start}", rows=few, epochs=few_epochs, rate_of="prefix 10", **own)
            for start, own in {
                "first rows": {},
                "words of the task": {"init_text": E2E_WORDS},
                "other words": {"init_text": "elephant banana divide keyboard"},
                "random": {"init": "random"},
            }.items()
        ),
    ]
    return Study(
        name="ablations",
        shared="e2e",
        title="E2E: length, embeddings alone, infix, start, MLP",
        arms=arms,
        data=lambda sample, rows: data.e2e(sample, rows, options.dev, options.test_inputs),
        metrics="e2e",
        primary="e2e.BLEU",
        contrasts=[
            ("embedding-only 10", "prefix 10"),
            ("infix 10", "prefix 10"),
            ("no mlp 10", "prefix 10"),
            ("random start 10", "prefix 10"),
            (f"{few} rows, random", f"{few} rows, words of the task"),
            (f"{few} rows, other words", f"{few} rows, words of the task"),
        ],
        cut=f"{options.rows} rows and {options.epochs} epochs (the paper: 42,000 and 5); seeds: {options.seeds}; learning rates "
        "chosen once for the MLP, embeddings, and keys and values alone, at length 10",
        published=published.ABLATIONS,
        differs=E2E_DIFFERS,
        expected=[
            "a rise with length up to about 10",
            "embedding-only far behind",
            "infix somewhat behind",
            "a start from words ahead of a random one with few rows, words of the task ahead of others",
        ],
        x_label="virtual tokens",
        **common(options),
    )


SYNOPSIS_DIFFERS = (
    "the data (Debian packages' descriptions and their one-line synopses for XSUM's articles and summaries: shorter on both "
    "sides, 23,691 rows for 204,000)"
)


def summarization(options: Namespace) -> Study:
    """Summaries by a decoder-only base, by training size (section 6.2, figure 3)."""
    chosen, arms = _curve({100: 8, 400: 3, 1600: 1}, options, {"prefix": SYNOPSIS_WORDS})
    return Study(
        name="summarization",
        title="Synopses: prefix against full fine-tuning",
        arms=arms,
        data=lambda sample, rows: data.synopsis(sample, rows, options.dev, options.test_inputs),
        metrics="rouge",
        primary="ROUGE-L",
        contrasts=[(f"fine-tuning {size}", f"prefix {size}") for size in chosen],
        framing=Framing(template="{input}\nSynopsis:", max_input_tokens=256),
        max_output_tokens=30,
        new_tokens=30,
        cut=f"at most {max(chosen)} rows, seeds: {options.seeds}, 256 tokens of a document, "
        f"{options.test_inputs} test inputs; the prefix starts from {SYNOPSIS_WORDS!r}",
        published=published.XSUM,
        differs=f"{SYNOPSIS_DIFFERS}; the base (SmolLM2-135M-Instruct for BART large); greedy outputs for beams of 6.",
        expected=["prefix ahead of fine-tuning with few rows, behind with all (the paper's all are 204,000)"],
        x_label="training rows",
        **common(options),
    )


def encoder_decoder(options: Namespace) -> Study:
    """Three sections of prefix, the decoder's alone, and full fine-tuning, on the small BART of benchmarks/bart.py."""
    from benchmarks.bart import default_folder, pretrain

    if options.base is None:
        folder = default_folder(options.bart_minutes)
        options.base = str(folder if options.table else pretrain(folder, minutes=options.bart_minutes))
    length = options.length
    budget = {"rows": options.rows, "epochs": options.epochs}
    arms = [
        *(
            Arm(name=name, method="prefix", grid="prefix-small", options=own, **budget)
            for name, own in {
                "three sections": Options(length=length),
                "decoder alone, equal length": Options(length=length, section="decoder"),
                "decoder alone, equal parameters": Options(length=3 * length, section="decoder"),
            }.items()
        ),
        Arm(name="fine-tuning", method="full", grid="full-small", **budget),
    ]
    return Study(
        name="encoder-decoder",
        title="Synopses by a small BART: which sections have a prefix",
        arms=arms,
        data=lambda sample, rows: data.synopsis(sample, rows, options.dev, options.test_inputs),
        metrics="rouge",
        primary="ROUGE-L",
        contrasts=[
            ("decoder alone, equal length", "three sections"),
            ("decoder alone, equal parameters", "three sections"),
            ("fine-tuning", "three sections"),
        ],
        batch_size=16,
        framing=Framing(template="{input}", max_input_tokens=256),
        max_output_tokens=40,
        new_tokens=40,
        cut=f"{options.rows} rows, {options.epochs} epochs, seeds: {options.seeds}, {options.test_inputs} development rows for tests",
        published=published.XSUM,
        differs=f"{SYNOPSIS_DIFFERS}; the base (a BART of 9.7 million parameters, pretrained for {options.bart_minutes:g} minutes "
        "on the same documents, for BART large); greedy outputs for beams of 6.",
        expected=["prefixes behind full fine-tuning; of a prefix in the decoder alone the paper says nothing"],
        **common(options),
    )


def common(options: Namespace) -> Mapping[str, Any]:
    return {
        "base": options.base or "smollm2-135m",
        **{"samples": options.samples, "seeds": options.seeds, "beams": options.beams},
        **{"dtype": options.dtype, "device": options.device, "settings": options.changed},
    }


STUDIES: Mapping[str, tuple[Callable[[Namespace], Study], Mapping[str, Any]]] = {
    "e2e-lowdata": (low_data, {"samples": 3, "sizes": None, "starts": ["words"], "dev": 50, "test_inputs": 100}),
    "baselines": (
        baselines,
        {"rows": 500, "epochs": 3, "seeds": 2, "dev": 50, "test_inputs": 100, "methods": None},
    ),
    "defaults": (
        defaults,
        {"rows": 500, "epochs": 5, "seeds": 3, "dev": 50, "test_inputs": 100, "dtype": "bfloat16"},
    ),
    "webnlg": (webnlg, {"rows": 1000, "epochs": 2, "seeds": 2, "dev": 60, "test_inputs": 100, "test": None}),
    "ablations": (ablations, {"rows": 500, "epochs": 3, "dev": 50, "test_inputs": 100}),
    "summarization": (summarization, {"sizes": None, "dev": 100, "test_inputs": 500}),
    "encoder-decoder": (
        encoder_decoder,
        {"rows": 4000, "epochs": 4, "seeds": 2, "dev": 200, "test_inputs": 500, "bart_minutes": 60.0},
    ),
}
"""The studies by name, with the defaults of their flags."""
