"""How a prefix is trained: the settings, their defaults and their ranges."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from foreword.errors import SettingsError

__all__ = ["DEFAULT_LR", "REPARAMETRIZATIONS", "Reparametrization", "TrainSettings"]

Reparametrization = Literal["direct", "mlp", "embedding"]
REPARAMETRIZATIONS: tuple[Reparametrization, ...] = get_args(Reparametrization)

DEFAULT_LR = {"direct": 5e-2, "mlp": 1e-3, "embedding": 2e-2}
"""The peak learning rate of each reparametrization, unless another is given."""


def as_numbers(settings: Any, kind: type[int] | type[float], names: Iterable[str]) -> None:
    """Make Python's own numbers of what may be numpy's, or a configuration file's, in a frozen dataclass.

    Raises:
        SettingsError: one is no such number.
    """
    as_kind: Callable[[Any], Any] = operator.index if kind is int else float
    for name in names:
        value = getattr(settings, name)
        try:
            object.__setattr__(settings, name, None if value is None else as_kind(value))
        except (TypeError, ValueError, OverflowError):
            what = "whole number" if kind is int else "number"
            raise SettingsError(f"expected a {what} for {name}; got {value!r}") from None


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a prefix is trained. The defaults were measured; see docs/defaults.md.

    Args:
        length: P, virtual tokens.
        reparametrization: "mlp", "direct" (keys and values are the parameters), or "embedding" (an ablation).
        hidden: hidden size of the MLP, which "mlp" alone has; by default 512, and 800 from 100 virtual tokens on.
        init: "activations" of the first training rows, or of `init_text`; "random", small noise.
        init_text: words of the task, e.g. "Describe the restaurant:"; their activations start the prefix.
        lr: peak learning rate; by default 1e-3 mlp, 5e-2 direct, 2e-2 embedding.
        epochs: passes over the rows.
        batch_size: rows that go through the base at once, on each process.
        accumulation: such batches, on each process, to one step.
        warmup: share of the steps during which the learning rate grows from zero; it then falls linearly to zero.
        clip: largest norm of the gradient; 0 for none.
        weight_decay: AdamW's.
        patience: epochs without a lower development loss after which training stops; 0 for never. It needs
            development rows.
        max_output_tokens: a longer y is cut. Default: no limit.
        gradient_checkpointing: recompute the base's layers in the backward pass, for less memory.
        infix: the paper's ablation [x; infix; y]; such a prefix cannot be saved.
        seed: of all that is random.
    """

    length: int = 10
    reparametrization: Reparametrization = "mlp"
    hidden: int | None = None
    init: str = "activations"
    init_text: str | None = None
    lr: float | None = None
    epochs: int = 5
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    patience: int = 0
    max_output_tokens: int | None = None
    gradient_checkpointing: bool = False
    infix: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("length", "hidden", "epochs", "batch_size", "accumulation", "max_output_tokens")
        as_numbers(self, int, (*counts, "patience", "seed"))
        as_numbers(self, float, ("lr", "warmup", "clip", "weight_decay"))
        least = {
            **dict.fromkeys(counts, 1),
            **dict.fromkeys(("clip", "weight_decay", "patience", "seed"), 0),
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise SettingsError(f"expected {name} of at least {low}; got {value}")
        if self.seed >= 1 << 32:
            raise SettingsError(f"expected a seed below 2**32; got {self.seed}")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"expected warmup, a share of the steps, in [0, 1); got {self.warmup}")
        if self.reparametrization not in REPARAMETRIZATIONS:
            raise SettingsError(
                f"expected a reparametrization of {', '.join(REPARAMETRIZATIONS)}; got {self.reparametrization!r}"
            )
        if self.hidden is not None and self.reparametrization != "mlp":
            raise SettingsError(
                f"hidden is the size of the MLP, and the reparametrization {self.reparametrization!r} has none: leave it away"
            )
        if self.init not in ("activations", "random"):
            raise SettingsError(f"expected init 'activations' or 'random'; got {self.init!r}")
        if self.init_text is not None and not self.init_text.strip():
            raise SettingsError("expected at least one word in init_text; it is empty")
        if self.init_text is not None and any("\ud800" <= character <= "\udfff" for character in self.init_text):
            raise SettingsError("expected Unicode text in init_text; got a lone surrogate")
        if self.init_text is not None and self.init == "random":
            raise SettingsError("init_text gives activations to start from: leave it away, or init 'random'")
        if self.lr is not None and not 0 < self.lr <= 1e6:
            raise SettingsError(f"expected a learning rate above 0, and no more than a million; got {self.lr}")

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else DEFAULT_LR[self.reparametrization]
