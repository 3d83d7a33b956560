"""A training run's checkpoint: one safetensors file beside the prefix file, replaced whole or not at all.

It holds what changes while a prefix is trained, and the hash of what does not. No text is in it, and no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from foreword.errors import TrainingError
from foreword.writing import check_new, write_atomically

__all__ = ["check_out", "checkpoint_of", "read_checkpoint", "write_checkpoint"]


def checkpoint_of(out: str | PathLike[str]) -> Path:
    """Where the checkpoint of the run that writes `out` is: `out` and `.checkpoint`."""
    return Path(f"{Path(out)}.checkpoint")


def check_out(out: str | PathLike[str], *, resume: bool | None = False, overwrite: bool = False) -> None:
    """See before any work whether a run may write `out` and its checkpoint, and can.

    With `resume`, a checkpoint beside `out` says that `out` is the run's own: it was killed between the two. None is for
    what is no training run, and cannot go on with one.

    Raises:
        TrainingError: a run's checkpoint is there, which would be lost.
        SettingsError: as `check_new`.
    """
    checkpoint = checkpoint_of(out)
    if checkpoint.exists() and not (resume or overwrite):
        if resume is None:
            raise TrainingError(
                f"{checkpoint} is of a training run that did not end and writes {out}: choose another name, or give "
                "--overwrite"
            )
        raise TrainingError(f"{checkpoint} is of a run that did not end: give --resume to go on, or --overwrite")
    check_new(out, overwrite=overwrite or (resume is True and checkpoint.exists()))


def write_checkpoint(
    path: Path, identity: str, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]
) -> None:
    """Replace the checkpoint at `path`.

    Args:
        path: see `checkpoint_of`.
        identity: hash of all that decides the run's outcome.
        tensors: by name.
        numbers: plain JSON values.
    """
    content = safetensors_bytes(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"identity": identity, "numbers": json.dumps(numbers)},
    )
    with write_atomically(path) as aside:
        aside.write_bytes(content)


def read_checkpoint(path: Path, identity: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and numbers that `write_checkpoint` was given.

    Raises:
        TrainingError: the file is damaged, or of a run with another identity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: Mapping[str, str] = file.metadata() or {}
            # copies: the file's own tensors are views of it, and it is soon replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): remove it, or give --overwrite") from None
    if header.get("identity") != identity:
        raise TrainingError(
            f"{path} is of a run with other data, settings, base or version of foreword: repeat that run's, or remove the "
            "checkpoint to start anew"
        )
    numbers: dict[str, Any] = json.loads(header["numbers"])
    return tensors, numbers
