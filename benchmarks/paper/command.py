"""The paper's claims, each by a command, and what else is trained to be compared.

    python -m benchmarks.paper e2e-lowdata        # and webnlg, ablations, summarization, encoder-decoder
    python -m benchmarks.paper baselines          # other ways to tune
    python -m benchmarks.paper defaults           # foreword's defaults against PEFT's prefix tuning
    python -m benchmarks.paper webnlg --test webnlg_challenge_2017/test --rows 18000 --epochs 5 --test-inputs 2000
    python -m benchmarks.paper e2e-lowdata --table

Each goes on where it was stopped, one JSON file a finished run, by two processes beside each other, and writes
NAME.md, NAME.json and NAME.svg into benchmarks/results/, finished or not. Other sizes than the default, or some of
them, have files named after them. Runs on the same data, such as those of e2e-lowdata, ablations and baselines, lie in
one folder, and what several need is run once.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.paper.studies import STARTS, STUDIES, WAYS
from benchmarks.report import report
from benchmarks.runs import beside_each_other
from benchmarks.study import Study, run, todo

COMMON = {
    **{"samples": 1, "seeds": 1, "length": 10, "beams": 1},
    **{"base": None, "dtype": "float32", "device": None, "processes": 2},
}
HELP = {
    "samples": "samples of training rows",
    "seeds": "seeds of each",
    "length": "virtual tokens",
    "beams": "beams; 1 for greedy outputs",
    "base": "by default smollm2-135m, and for encoder-decoder the small BART",
    "dtype": "of the base; not the machine's choice, since a study may go on on another one",
    "device": "as torch names it",
    "processes": "to share the runs, and the cores",
    "rows": "training rows",
    "sizes": "of the curve's training sizes, these alone",
    "starts": "what the prefixes start from: words of the task, as the paper's; the first rows, foreword's default",
    "methods": "of the ways to tune, these alone",
    "epochs": "passes over the rows",
    "dev": "inputs on which learning rates are chosen",
    "test_inputs": "inputs that are reported, at the most (WebNLG: of seen and of unseen categories each)",
    "test": "the challenge's own test folder",
    "bart_minutes": "of pretraining the small BART, where it is not there yet",
}
LISTS: dict[str, dict[str, Any]] = {
    "sizes": {"type": int},
    "starts": {"choices": list(STARTS)},
    "methods": {"choices": sorted({method for method, _, _ in WAYS.values()})},
}
"""Flags that take several values."""
SAME_RUNS = ("samples", "seeds", "device", "processes")
"""Flags that change how many runs there are or how they are made, but not a run; the others are in the names of what is written."""


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (make, own) in STUDIES.items():
        command = commands.add_parser(name, help=make.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for flag, default in {**COMMON, **own}.items():
            if flag in LISTS:
                kind = {"nargs": "+", **LISTS[flag]}
            else:
                kind = {"type": str if default is None else type(default)}
            command.add_argument(f"--{flag.replace('_', '-')}", default=default, help=HELP[flag], **kind)
        command.add_argument("--table", action="store_true", help="report what is there, and run nothing")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"expected at least one process; got {options.processes}")
    usual = {**COMMON, **STUDIES[options.name][1]}
    given = {flag: getattr(options, flag) for flag, default in usual.items() if getattr(options, flag) != default}
    options.changed = {flag: value for flag, value in given.items() if flag not in SAME_RUNS}
    return options


def study_of(options: argparse.Namespace) -> Study:
    make, _ = STUDIES[options.name]
    return make(options)


def work(arguments: list[str]) -> None:
    """Do the runs that are missing and that nobody else does."""
    study = study_of(options_of(arguments))
    study.runs.work(lambda: todo(study), lambda unit: run(study, unit))


def main() -> None:
    arguments = sys.argv[1:]
    options = options_of(arguments)
    study = study_of(options)
    if not options.table:
        beside_each_other(work, arguments, processes=options.processes)
    command = ["python -m benchmarks.paper", *(word for word in arguments if word != "--table")]
    print(report(study, command=" ".join(command)))
