"""Settings by name: those that won here, and the paper's own. `foreword train --recipe NAME` takes them.

A recipe is a row of the table below. What a user gives on the command line wins over it; what it doesn't name keeps its
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foreword.errors import SettingsError
from foreword.tasks.summarization import LENGTHS

__all__ = ["RECIPES", "Recipe", "recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a prefix is trained for a task, and how its outputs are generated.

    Args:
        options: by name, options of `foreword train`: fields of `TrainSettings`, and `max_input_tokens`.
        generation: by name, options of `foreword evaluate`.
        source: where the numbers are from.
    """

    options: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    source: str


_PAPER: Mapping[str, Any] = {
    # appendix A.1 leaves the schedule to Hugging Face's default of 2020: linear decay without warm-up, clipping at 1
    **{"reparametrization": "mlp", "init": "random", "warmup": 0.0, "clip": 1.0, "weight_decay": 0.0},
}
_TABLE = (
    "Li & Liang 2021, table 5 (learning rate, epochs, batch size, length); section 4.3 and the paper's code (MLP of {} "
    "hidden units, random start); trained there on {}"
)
_GPT2 = _TABLE.format(512, "GPT-2 medium and large")
_BEAMS: Mapping[str, Any] = {"num_beams": 5}

RECIPES: Mapping[str, Recipe] = {
    "e2e": Recipe(
        options={
            **{"length": 10, "reparametrization": "mlp", "init": "activations"},
            **{"lr": 1e-3, "epochs": 5, "batch_size": 16, "warmup": 0.1},
        },
        generation=_BEAMS,
        source="docs/defaults.md: 500 E2E rows on smollm2-135m, three seeds",
    ),
    "e2e-few": Recipe(
        options={
            **{"length": 10, "reparametrization": "mlp", "init_text": "table-to-text: describe the restaurant"},
            **{"lr": 1.25e-4, "epochs": 8, "batch_size": 8, "warmup": 0.1},
        },
        generation=_BEAMS,
        source="docs/defaults.md: 100 E2E rows on smollm2-135m, three samples of rows",
    ),
    "webnlg": Recipe(
        options={
            **{"length": 10, "reparametrization": "mlp", "init_text": "table-to-text: describe the facts"},
            **{"lr": 5e-4, "epochs": 2, "batch_size": 8, "warmup": 0.1},
        },
        generation=_BEAMS,
        source="docs/tasks.md: 1,000 WebNLG rows of five categories on smollm2-135m, two seeds",
    ),
    "summarization": Recipe(
        options={
            **{"length": 10, "reparametrization": "mlp", "init_text": "summarize: describe the package in one line"},
            **{"lr": 2.5e-4, "epochs": 1, "batch_size": 8, "warmup": 0.1},
            **{"max_input_tokens": 256, "max_output_tokens": 30},
        },
        generation={**_BEAMS, "max_new_tokens": 30},
        source="docs/tasks.md: 1,600 rows of Debian packages' synopses on smollm2-135m, one seed",
    ),
    "paper-e2e": Recipe(
        options={**_PAPER, "hidden": 512, "length": 5, "lr": 8e-5, "epochs": 5, "batch_size": 10},
        generation=_BEAMS,
        source=_GPT2,
    ),
    "paper-webnlg": Recipe(
        options={**_PAPER, "hidden": 512, "length": 5, "lr": 5e-5, "epochs": 5, "batch_size": 5},
        generation=_BEAMS,
        source=_GPT2,
    ),
    "paper-dart": Recipe(
        options={**_PAPER, "hidden": 512, "length": 10, "lr": 5e-5, "epochs": 10, "batch_size": 5},
        generation=_BEAMS,
        source=_GPT2,
    ),
    "paper-xsum": Recipe(
        options={
            **{**_PAPER, "hidden": 800, "length": 100, "lr": 5e-5, "epochs": 30, "batch_size": 14},
            **{"max_input_tokens": LENGTHS["xsum"].source, "max_output_tokens": LENGTHS["xsum"].target},
        },
        generation={"num_beams": 6, "length_penalty": 0.8, "max_new_tokens": LENGTHS["xsum"].generated},
        source=_TABLE.format(800, "BART large") + "; section 5.3 and the code for the lengths",
    ),
}
"""The recipes, by name."""


def recipe(name: str) -> Recipe:
    """The recipe of a name. Raises `SettingsError` where there is none."""
    if name not in RECIPES:
        raise SettingsError(f"expected a recipe of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]
