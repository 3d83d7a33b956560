"""The idea: a prefix is, for every attention layer of a frozen base, P key vectors and P value vectors.

    decoder-only      z = [prefix; x; y]             one section:    decoder
    encoder-decoder   z = [prefix; x; prefix'; y]    three sections: encoder, decoder, cross

Position i of the sequence has the activations h_i = P_θ[i] where i is in the prefix, and h_i = LM(z_i, h_<i)
everywhere else (Li & Liang 2021, section 4). So a prefix holds exactly what the attention cache of the base would hold
for P tokens: keys are already rotated in a base with rotary positions.

One prefix is one `.safetensors` file: the tensors `SECTION.LAYER.keys` and `SECTION.LAYER.values`, each [G, P, D], and a
card in the header, which says for which base it is, how x is framed and how it came to be.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as safetensors_bytes

from foreword.errors import PrefixFileError, SettingsError, WrongBaseError, one_line
from foreword.settings import as_numbers
from foreword.writing import write_atomically

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["SECTIONS", "Card", "Framing", "Prefix", "check_dtype"]

SECTIONS = ("encoder", "decoder", "cross")
"""Every section a prefix may have, in the order in which the model meets them."""

FORMAT = 1
"""Version of the file's layout. A file of a higher version is refused, not guessed at."""

MAX_CARD_BYTES = 1 << 20

LARGEST = 1e6
"""Keys and values far beyond this overflow in a base's attention, which would spoil the rows beside; T5's own go to tens of
thousands."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What keys and values may be made of; narrower numbers have no arithmetic of their own."""

Layer = tuple[torch.Tensor, torch.Tensor]
"""The keys and the values of one layer, each [G, P, D]."""


class Fits(Protocol):
    """What `Prefix.check` looks at of a base."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, Sequence[tuple[int, int]]]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How x is made of a record, kept in the card so that generation frames x as training did.

    Args:
        template: a format string over the record's fields. Default: the input and a line break.
        chat: frame `messages` by the base's own chat template instead; `template` is not used then.
        max_input_tokens: a longer x loses tokens at the end of its last field, or of its last message; one that would lose
            more is an error. Default: no limit, and an x that does not fit the base is an error.
    """

    template: str = "{input}\n"
    chat: bool = False
    max_input_tokens: int | None = None

    def __post_init__(self) -> None:
        as_numbers(self, int, ["max_input_tokens"])
        if self.max_input_tokens is not None and self.max_input_tokens < 1:
            raise SettingsError(f"expected max_input_tokens of at least 1; got {self.max_input_tokens}")
        if not isinstance(self.template, str) or not isinstance(self.chat, bool):
            raise SettingsError(
                f"expected a text as template and a bool as chat; got {self.template!r:.50} and {self.chat!r:.50}"
            )


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a prefix file says about itself. It holds no training text.

    Args:
        base: name of the base, for people.
        fingerprint: of the base's configuration and weights, the same in every dtype; see `Base.fingerprint`.
        framing: how x is framed.
        init: how the prefix was initialized, in a word or two.
        training: settings and outcome of the training, plain JSON values.
        metrics: figures on development data, by name.
        created: UTC time, ISO 8601.
    """

    base: str
    fingerprint: str
    framing: Framing = field(default_factory=Framing)
    init: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Read a card. Raises `PrefixFileError` where fields are missing or of the wrong kind."""
        try:
            raw = {**json.loads(text)}
            version = raw.pop("format")
            if version == FORMAT:
                card = cls(**{**raw, "framing": Framing(**raw["framing"])})
                # NaN and half a surrogate pair can be read, but not printed or written for everybody to read
                json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, KeyError, RecursionError, SettingsError) as error:
            raise PrefixFileError(
                f"the card in the file's header cannot be read ({one_line(error)}): the file was not written by this "
                "version of foreword"
            ) from None
        if version != FORMAT:
            raise PrefixFileError(
                f"expected format {FORMAT}; the file has format {one_line(version)}: upgrade foreword"
            )
        strings = (card.base, card.fingerprint, card.init, card.created)
        if not (
            all(isinstance(value, str) for value in strings)
            and isinstance(card.training, dict)
            and isinstance(card.metrics, dict)
            # an integer that no float holds would break whoever prints it
            and all(
                type(value) is float or (type(value) is int and value.bit_length() < 1024)
                for value in card.metrics.values()
            )
            # an infix has no file format
            and card.training.get("infix") is not True
        ):
            raise PrefixFileError("the card has fields of the wrong kind: the file is damaged, or not foreword's")
        return card


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values for every layer of every section, and the card that says where they belong.

    Args:
        sections: for each section the layers, in order; a layer is (keys, values), each [G, P, D]. G and D may
            differ between layers, P may not.
        card: see `Card`.

    Raises:
        PrefixFileError: sections or shapes that no base can have, or numbers that are not finite.
    """

    sections: Mapping[str, Sequence[Layer]] = field(repr=False)
    card: Card

    def __post_init__(self) -> None:
        object.__setattr__(self, "sections", {section: list(layers) for section, layers in self.sections.items()})
        names = set(self.sections)
        if names not in ({"decoder"}, set(SECTIONS)):
            raise PrefixFileError(
                f"expected the section 'decoder', or all of {', '.join(SECTIONS)}; got {', '.join(sorted(names)) or 'none'}"
            )
        lengths = set()
        for section, i, keys, values in self._walk():
            if keys.ndim != 3 or keys.shape != values.shape or 0 in keys.shape:
                raise PrefixFileError(
                    f"{section}.{i}: expected keys and values of one shape [G, P, D]; got {list(keys.shape)} and "
                    f"{list(values.shape)}"
                )
            lengths.add(keys.shape[1])
            for tensor in (keys, values):
                if tensor.dtype not in DTYPES:
                    raise PrefixFileError(
                        f"{section}.{i}: expected numbers of 16, 32 or 64 bits, floating-point; got {tensor.dtype}"
                    )
                if not torch.isfinite(tensor).all():
                    raise PrefixFileError(
                        f"{section}.{i}: expected finite numbers; the prefix is damaged, train it again"
                    )
        if len(lengths) != 1 or not all(self.sections.values()):
            raise PrefixFileError(
                "expected layers in every section, of one length P; got "
                f"{', '.join(map(str, sorted(lengths))) or 'no layers'}"
            )

    def _walk(self) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
        for section, layers in self.sections.items():
            for i, (keys, values) in enumerate(layers):
                yield section, i, keys, values

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return next(self._walk())[2].shape[1]

    @property
    def dtype(self) -> str:
        """The name of the tensors' dtype, such as "bfloat16"."""
        return str(next(self._walk())[2].dtype).removeprefix("torch.")

    @property
    def infix(self) -> bool:
        """Whether it was trained as [x; infix; y], the paper's ablation (section 7.3), and is to be used so."""
        return self.card.training.get("infix") is True

    @property
    def num_parameters(self) -> int:
        return sum(keys.numel() + values.numel() for _, _, keys, values in self._walk())

    @property
    def shapes(self) -> dict[str, list[tuple[int, int]]]:
        """For each section, (G, D) of each layer: what `foreword.families.section_shapes` says of a base."""
        return {
            section: [(keys.shape[0], keys.shape[2]) for keys, _ in layers] for section, layers in self.sections.items()
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What there is to show beside the card."""
        return {
            "length": self.length,
            "sections": {section: len(layers) for section, layers in self.sections.items()},
            "parameters": self.num_parameters,
            "dtype": self.dtype,
        }

    def check(self, base: Fits) -> Prefix:
        """Return the prefix itself if it was made for `base`.

        Raises:
            WrongBaseError: it was trained on another base.
            PrefixFileError: its shapes are not those of `base`, or its numbers would overflow there.
        """
        if self.card.fingerprint != base.fingerprint:
            raise WrongBaseError(
                f"expected a prefix for the base {base.name!r} (fingerprint {base.fingerprint[:12]}); this one was trained "
                f"on {self.card.base!r} ({self.card.fingerprint[:12]}): load that base, or train a prefix for this one"
            )
        if self.shapes != base.shapes:
            raise PrefixFileError("the prefix's layers do not fit the base that its card names: the file is damaged")
        largest, where = self._largest
        most = min(LARGEST, torch.finfo(base.dtype).max)
        if largest > most:
            raise PrefixFileError(
                f"{where}: expected numbers up to {most:,.0f}; got {largest:.3g}, which overflows in the base: train the prefix "
                "anew"
            )
        return self

    @cached_property
    def _largest(self) -> tuple[float, str]:
        """The largest number but for its sign, and its layer: found once, since every `generate` checks its prefixes."""
        return max(
            (tensor.abs().max().item(), f"{section}.{i}") for section, i, *layer in self._walk() for tensor in layer
        )

    def to_bytes(self, dtype: torch.dtype = torch.bfloat16) -> bytes:
        """The whole file, with tensors in `dtype`, see `check_dtype`.

        Raises:
            PrefixFileError: numbers too large for `dtype`, or a card that `load` would refuse.
        """
        check_dtype(dtype)
        if self.infix:
            raise PrefixFileError("an infix is an ablation and has no file format: use it in memory, or train a prefix")
        tensors = {}
        for section, i, keys, values in self._walk():
            for kind, tensor in (("keys", keys), ("values", values)):
                # a copy, since tensors that share memory are refused
                kept = tensor.detach().to("cpu", dtype, copy=True).contiguous()
                if not torch.isfinite(kept).all():
                    raise PrefixFileError(
                        f"{section}.{i}: expected numbers that {dtype} has; got larger ones: take float32"
                    )
                tensors[f"{section}.{i}.{kind}"] = kept
        # one entry: safetensors writes several in an order that changes from run to run
        metadata = {"foreword": self.card.to_json()}
        self._read_card(metadata)
        return safetensors_bytes(tensors, metadata=metadata)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the file aside and rename it, so that `path` is never half a file."""
        with write_atomically(path) as aside:
            aside.write_bytes(self.to_bytes(dtype))

    @classmethod
    def load(cls, path: str | os.PathLike[str], base: Base | None = None) -> Prefix:
        """Read a prefix file, in the dtype it was saved in.

        Args:
            path: a `.safetensors` file written by `save`.
            base: where given, the prefix is checked against it.

        Raises:
            FileNotFoundError: there is no such file.
            PrefixFileError: the file is truncated, foreign, or holds shapes or numbers that no prefix has.
            WrongBaseError: the prefix is of another base.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                # copies: the file's own tensors are views of it, and change or fault where it is written over
                prefix = cls._read(file.metadata() or {}, list(file.keys()), lambda name: file.get_tensor(name).clone())
        except SafetensorError as error:
            raise PrefixFileError(
                f"{path}: expected a safetensors file; it is truncated or something else ({one_line(error)})"
            ) from None
        except PrefixFileError as error:
            raise PrefixFileError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise FileNotFoundError(f"no prefix file at {path}") from None
        except OSError as error:
            if os.path.isdir(path):
                raise PrefixFileError(
                    f"{path}: cannot be read as a prefix file, as it is a folder: name the file in it"
                ) from None
            raise PrefixFileError(f"{path}: cannot be read as a prefix file ({one_line(error)})") from None
        return prefix if base is None else prefix.check(base)

    @classmethod
    def from_bytes(cls, data: bytes) -> Prefix:
        """Read a prefix from the bytes of its file, as `to_bytes` gave them.

        Raises:
            PrefixFileError: as `load` does.
        """
        try:
            tensors = load_tensors(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise PrefixFileError(
                f"expected a safetensors file; it is truncated or something else ({one_line(error)})"
            ) from None
        return cls._read(metadata, list(tensors), tensors.__getitem__)

    @classmethod
    def _read(cls, metadata: Mapping[str, str], names: Sequence[str], tensor: Callable[[str], torch.Tensor]) -> Prefix:
        """A prefix of what a file's header says; no tensor is fetched before that is found right."""
        card = cls._read_card(metadata)
        sections = cls._names_of_layers(names)
        return cls(
            {
                section: [(tensor(f"{layer}.keys"), tensor(f"{layer}.values")) for layer in layers]
                for section, layers in sections.items()
            },
            card,
        )

    @staticmethod
    def _read_card(metadata: Mapping[str, str]) -> Card:
        if "foreword" not in metadata:
            raise PrefixFileError("a safetensors file, but not a prefix: its header has no foreword card")
        if len(metadata["foreword"]) > MAX_CARD_BYTES:
            raise PrefixFileError(f"the card is larger than {MAX_CARD_BYTES} bytes: this is no prefix of foreword's")
        return Card.from_json(metadata["foreword"])

    @staticmethod
    def _names_of_layers(tensors: Sequence[str]) -> dict[str, list[str]]:
        """For each section that the file has, SECTION.LAYER of each layer."""
        names: dict[str, list[str]] = {}
        for section in SECTIONS:
            count = sum(name.startswith(f"{section}.") and name.endswith(".keys") for name in tensors)
            if count:
                names[section] = [f"{section}.{i}" for i in range(count)]
        expected = {f"{layer}.{kind}" for layers in names.values() for layer in layers for kind in ("keys", "values")}
        if odd := sorted(expected ^ set(tensors)):
            raise PrefixFileError(
                "expected tensors SECTION.LAYER.keys and .values for every layer; missing or unknown: "
                + one_line(", ".join(odd))
            )
        return names


def check_prefix(prefix: object, base: Base) -> None:
    """Raise `SettingsError` where something, such as a file's name, is no prefix; `WrongBaseError` as `Prefix.check`."""
    if not isinstance(prefix, Prefix):
        raise SettingsError(f"expected a Prefix; got {type(prefix).__name__}: see Prefix.load")
    prefix.check(base)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise `SettingsError` where a prefix file cannot be of a dtype."""
    if dtype not in DTYPES:
        raise SettingsError(f"expected one of {', '.join(map(str, DTYPES))} for the file; got {dtype!r}")
