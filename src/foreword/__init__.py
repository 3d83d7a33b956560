"""foreword: train, keep and use prefixes over one frozen language model.

base = foreword.load_base("smollm2-135m")
prefix = foreword.train(base, [{"input": "...", "output": "..."}, ...], out="task.safetensors")
foreword.generate(base, ["..."], prefix)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreword.bases import Base, load_base
    from foreword.errors import (
        BaseLoadError,
        DataError,
        ForewordError,
        HubError,
        MissingExtraError,
        NoSuchPrefixError,
        PrefixFileError,
        SettingsError,
        StoreError,
        TooLongError,
        TrainingError,
        WrongBaseError,
    )
    from foreword.generation import GenerateSettings, generate, stream
    from foreword.prefix import Card, Framing, Prefix
    from foreword.training import TrainingProgress, TrainSettings, attach_trainable, train
    from foreword.version import __version__

__all__ = [
    "Base",
    "BaseLoadError",
    "Card",
    "DataError",
    "ForewordError",
    "Framing",
    "GenerateSettings",
    "HubError",
    "MissingExtraError",
    "NoSuchPrefixError",
    "Prefix",
    "PrefixFileError",
    "SettingsError",
    "StoreError",
    "TooLongError",
    "TrainSettings",
    "TrainingError",
    "TrainingProgress",
    "WrongBaseError",
    "__version__",
    "attach_trainable",
    "generate",
    "load_base",
    "stream",
    "train",
]

_HOMES = {
    "bases": ("Base", "load_base"),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "generation": ("GenerateSettings", "generate", "stream"),
    "prefix": ("Card", "Framing", "Prefix"),
    "training": ("TrainSettings", "TrainingProgress", "attach_trainable", "train"),
    "version": ("__version__",),
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `foreword --help` needs neither
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"foreword.{home}"), name)
    raise AttributeError(f"module 'foreword' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
