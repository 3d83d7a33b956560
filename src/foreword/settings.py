"""How a prefix is trained and how text is generated: the settings, their defaults and their ranges."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from foreword.errors import SettingsError

__all__ = ["DEFAULT_LR", "REPARAMETRIZATIONS", "GenerateSettings", "Reparametrization", "TrainSettings"]

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
        batch_size: rows of a batch, on each process. They go through the base together; on a CPU, 4,096 tokens at a time.
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
        for name in counts:
            bits = (getattr(self, name) or 0).bit_length()
            if bits > 31:
                raise SettingsError(f"expected {name} below 2**31; got a number of {bits} bits")
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


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How text is generated.

    Args:
        max_new_tokens: most tokens of y, its end token included; fewer where the base's context ends first.
        num_beams: beams; 1 for none. The paper's table-to-text figures take 5.
        length_penalty: exponent to a beam's length, from -10 to 10; above 0 favours long ones.
        temperature: 0 for the most likely token, above 0 to sample.
        top_k: sample among this many most likely tokens; 0 for all.
        top_p: sample among the fewest most likely tokens that have this much probability together.
        stop: strings before which the text ends.
        seed: of sampling; each row draws from a generator of its own, made from the seed and the row's number.
        batch_size: rows that go through the base at once; no row's text depends on it.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        as_numbers(self, int, ("max_new_tokens", "num_beams", "top_k", "seed", "batch_size"))
        as_numbers(self, float, ("length_penalty", "temperature", "top_p"))
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"expected {name} of at least 1; got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise SettingsError(
                f"expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0; got {self.temperature}, {self.top_p}, {self.top_k}"
            )
        if not abs(self.length_penalty) <= 10:
            raise SettingsError(f"expected length_penalty from -10 to 10; got {self.length_penalty}")
        if self.num_beams > 1 and self.temperature > 0:
            raise SettingsError("beams and sampling exclude each other: set num_beams to 1, or temperature to 0")
        if isinstance(self.stop, str) or not all(isinstance(one, str) and one for one in self.stop):
            raise SettingsError(f"expected a list of non-empty stop strings; got {self.stop!r}")
