"""Other ways to tune the same base, on the same data and budget: 500 E2E rows, three epochs.

    python -m benchmarks.baselines            # goes on where it was stopped; writes benchmarks/results/baselines.*
    python -m benchmarks.baselines --table

Full fine-tuning, the top two layers, LoRA, prompt tuning and PEFT's prefix tuning beside foreword's prefix; no bottleneck
adapters, see benchmarks/methods.py for why. Three learning rates each on development inputs, more while the best is at the
edge, by one rule for all; then another seed. Reported on 100 held-out meaning representations. On two cores it is meant to
take two and a half to three hours, after e2e-lowdata of benchmarks.paper, with which it shares runs.
"""

from __future__ import annotations

import argparse

from benchmarks.methods import Options
from benchmarks.paper import data, published
from benchmarks.report import work_and_report
from benchmarks.study import Arm, Study

ARMS = {
    "foreword's prefix": ("prefix", None, Options()),
    "foreword's prefix, no MLP": ("prefix", "prefix-direct", Options(reparametrization="direct")),
    "PEFT's prefix tuning": ("peft-prefix", None, Options()),
    "prompt tuning": ("prompt", None, Options()),
    "LoRA": ("lora", None, Options()),
    "top two layers": ("top2", None, Options()),
    "full fine-tuning": ("full", None, Options()),
}

USUAL = {
    **{"rows": 500, "epochs": 3, "dev": 50, "test_inputs": 100, "base": "smollm2-135m", "dtype": "float32"},
    "methods": None,
}
"""What makes a run or a part of the report; with other values the files are named after them."""


def baselines(options: argparse.Namespace) -> Study:
    names = [name for name, (method, _, _) in ARMS.items() if options.methods is None or method in options.methods]
    return Study(
        name="baselines",
        shared="e2e",
        title=f"E2E, {options.rows} rows, {options.epochs} epochs: ways to tune",
        base=options.base,
        arms=[
            Arm(name=name, method=method, grid=grid, rows=options.rows, epochs=options.epochs, options=own)
            for name in names
            for method, grid, own in [ARMS[name]]
        ],
        data=lambda sample, rows: data.e2e(sample, rows, options.dev, options.test_inputs),
        metrics="e2e",
        primary="e2e.BLEU",
        contrasts=[(name, names[0]) for name in names[1:]],
        seeds=options.seeds,
        dtype=options.dtype,
        device=options.device,
        cut=f"{options.rows} rows (the challenge: 42,000), seeds: {options.seeds}, {options.test_inputs} test inputs",
        published=published.E2E,
        differs="see e2e-lowdata of benchmarks.paper; adapters are missing, since no library for them runs here",
        settings={flag: getattr(options, flag) for flag, usual in USUAL.items() if getattr(options, flag) != usual},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dev", type=int)
    parser.add_argument("--test-inputs", type=int)
    parser.add_argument("--methods", nargs="+", choices=sorted({method for method, _, _ in ARMS.values()}))
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--table", action="store_true", help="report what is there, and run nothing")
    parser.set_defaults(**USUAL)
    options = parser.parse_args()
    work_and_report(baselines(options), module="benchmarks.baselines", table=options.table)


if __name__ == "__main__":
    main()
