"""What is trained: P_θ itself, or what it is computed from.

For each section, P_θ is a matrix [P, W]; its row i holds the keys and values of virtual token i in all L layers, so
W is the sum of 2·G·D over the layers.

    mlp          P_θ[i] = A[i] + MLP(P'_θ[i])      (Li & Liang 2021, section 4.3; A is zero, or the initialization)
    direct       P_θ is the parameter
    embedding    P_θ[i] = LM(E)[i]                 (the paper's embedding-only ablation, section 7.2; decoder-only)

Once trained, P_θ is computed a last time and only its keys and values are kept: `fold`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from foreword.attach import Stack
from foreword.capture import capture
from foreword.errors import SettingsError, TooLongError
from foreword.prefix import Card, Layer, Prefix
from foreword.settings import Reparametrization

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = [
    "DirectPrefix",
    "EmbeddingPrefix",
    "MLPPrefix",
    "TrainablePrefix",
    "activations",
    "matrices_of",
    "trainable_prefix",
]

Shapes = Mapping[str, Sequence[tuple[int, int]]]
Matrices = Mapping[str, torch.Tensor]


def width(layers: Sequence[tuple[int, int]]) -> int:
    """W of a section whose layers have (G, D)."""
    return sum(2 * groups * dim for groups, dim in layers)


def _parts(matrix: torch.Tensor, layers: Sequence[tuple[int, int]]) -> Sequence[torch.Tensor]:
    """The columns of each layer's keys, and then of its values."""
    return matrix.split([groups * dim for groups, dim in layers for _ in range(2)], dim=-1)


def layers_of(matrix: torch.Tensor, layers: Sequence[tuple[int, int]]) -> list[Layer]:
    """Cut [..., P, W] into each layer's keys and values, [..., G, P, D]."""
    parts = _parts(matrix, layers)
    heads = [part.unflatten(-1, layers[slot // 2]).transpose(-2, -3) for slot, part in enumerate(parts)]
    return list(zip(heads[::2], heads[1::2], strict=True))


def matrix_of(layers: Sequence[Layer]) -> torch.Tensor:
    """The inverse of `layers_of`: [G, P, D] keys and values of each layer as one [P, W], in float32; float64 stays."""
    matrix = torch.cat([tensor.transpose(-2, -3).flatten(-2) for layer in layers for tensor in layer], dim=-1)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def matrices_of(prefix: Prefix) -> dict[str, torch.Tensor]:
    """P_θ of a saved prefix, [P, W] in float32 for each section."""
    return {section: matrix_of(layers).float() for section, layers in prefix.sections.items()}


class TrainablePrefix(nn.Module):
    """A prefix that learns: a module to `attach` to a model, and to `fold` into a `Prefix` when trained."""

    def __init__(self, shapes: Shapes, length: int):
        super().__init__()
        self.shapes = {section: list(layers) for section, layers in shapes.items()}
        self.length = length

    def matrices(self) -> dict[str, torch.Tensor]:
        """P_θ as it stands, [P, W] for each section."""
        raise NotImplementedError

    def forward(self) -> Stack:
        return Stack(
            {section: layers_of(matrix[None], self.shapes[section]) for section, matrix in self.matrices().items()}
        )

    @torch.no_grad()
    def fold(self, card: Card) -> Prefix:
        """The keys and values alone, on the CPU, in the dtype of the parameters."""
        return Prefix(
            {
                section: [
                    (keys.cpu().contiguous(), values.cpu().contiguous())
                    for keys, values in layers_of(matrix, self.shapes[section])
                ]
                for section, matrix in self.matrices().items()
            },
            card,
        )


class DirectPrefix(TrainablePrefix):
    """P_θ = θ S: keys and values are the parameters, those of each layer in units of their own size.

    S has a number for each layer's keys and one for its values: the power of two next to their root mean square at the
    start. Layers differ in it (SmolLM2-135M's values, on a text, from 0.05 to 2), while AdamW moves all parameters alike.

    Args:
        shapes: (G, D) of each layer, for each section.
        length: P.
        start: P_θ at the start, [P, W] for each section. Default: normal noise with deviation 0.02, and S is 1.
    """

    def __init__(self, shapes: Shapes, length: int, start: Matrices | None = None):
        super().__init__(shapes, length)
        self.p_theta = nn.ParameterDict()
        for section, layers in shapes.items():
            if start is None:
                matrix, scale = torch.randn(length, width(layers)) * 0.02, torch.ones(width(layers))
            else:
                matrix, scale = start[section], _scale(start[section], layers)
            self.p_theta[section] = nn.Parameter(matrix / scale)
            self.register_buffer(f"scale_{section}", scale)

    def matrices(self) -> dict[str, torch.Tensor]:
        return {section: theta * self.get_buffer(f"scale_{section}") for section, theta in self.p_theta.items()}


def _scale(matrix: torch.Tensor, layers: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[W]: for the columns of each layer's keys, and of its values, the power of two next to their root mean square."""
    parts = _parts(matrix, layers)
    # a power of two changes no digit of what it is multiplied with; and zeros stay what they are
    sizes = [part.square().mean().sqrt() or torch.ones(()) for part in parts]
    return torch.cat(
        [size.log2().round().exp2().expand(part.shape[-1]) for size, part in zip(sizes, parts, strict=True)]
    )


class MLPPrefix(TrainablePrefix):
    """P_θ[i] = A[i] + MLP(P'_θ[i]): a smaller matrix P'_θ through a two-layer network with tanh, one for each section.

    Args:
        shapes: (G, D) of each layer, for each section.
        length: P.
        dim: columns of P'_θ; the paper's code takes the base's hidden size.
        hidden: width of the hidden layer.
        start: A, [P, W] for each section; the network then starts at zero. Default: A is zero and the network random.
    """

    def __init__(self, shapes: Shapes, length: int, dim: int, hidden: int, start: Matrices | None = None):
        super().__init__(shapes, length)
        self.p_small = nn.ParameterDict({section: nn.Parameter(torch.randn(length, dim)) for section in shapes})
        self.mlp = nn.ModuleDict()
        for section, layers in shapes.items():
            last = nn.Linear(hidden, width(layers))
            if start is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
                self.register_buffer(f"start_{section}", start[section].clone())
            self.mlp[section] = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), last)
        self.has_start = start is not None

    def matrices(self) -> dict[str, torch.Tensor]:
        moved = {section: mlp(self.p_small[section]) for section, mlp in self.mlp.items()}
        if not self.has_start:
            return moved
        return {section: self.get_buffer(f"start_{section}") + matrix for section, matrix in moved.items()}


class EmbeddingPrefix(TrainablePrefix):
    """P_θ = LM(E): only input embeddings are trained, and the frozen base computes the rest, as in prompt tuning.

    Args:
        base: a decoder-only base.
        length: P.
        start: ids of the tokens whose embeddings are E at the start. Default: normal noise with the deviation of the
            base's own embeddings.

    Raises:
        SettingsError: the base is an encoder-decoder. TooLongError: P tokens exceed its context.
    """

    def __init__(self, base: Base, length: int, start: Sequence[int] | None = None):
        if base.is_encoder_decoder:
            raise SettingsError(
                "embedding-only virtual tokens need a decoder-only base; use the reparametrization 'direct' or 'mlp'"
            )
        super().__init__(base.shapes, length)
        size = len(base.embeddings)
        ids = range(0, size, max(1, size // 4096)) if start is None else _repeated(start, length)
        with torch.no_grad():
            # by the base's own module, since Gemma's scales what it looks up
            own = base.model.get_input_embeddings()(torch.tensor(ids, device=base.device)).float().cpu()
        self.embeddings = nn.Parameter(torch.randn(length, own.shape[1]) * own.std() if start is None else own)
        # in a list, so that the base does not become a submodule of its own submodule
        self._base = [base]

    def matrices(self) -> dict[str, torch.Tensor]:
        model = self._base[0].model
        with capture(model) as seen:
            model.base_model(inputs_embeds=self.embeddings[None].to(model.dtype), use_cache=False)
        layers = seen["decoder"]
        return {"decoder": matrix_of([(layers[i][0][0], layers[i][1][0]) for i in range(len(layers))])}


def _repeated(ids: Sequence[int], length: int) -> list[int]:
    assert len(ids) > 0
    return list(itertools.islice(itertools.cycle(ids), length))


@torch.no_grad()
def activations(base: Base, x: Sequence[int], y: Sequence[int], length: int) -> dict[str, torch.Tensor]:
    """P_θ as the base itself computes it for real tokens (Li & Liang 2021, section 7.4).

    Args:
        base: the frozen base.
        x: token ids for the first section; fewer than P are repeated.
        y: token ids for the decoder of an encoder-decoder base; not used otherwise.
        length: P.

    Returns:
        for each section [P, W], float32, on the CPU.

    Raises:
        TooLongError: P tokens exceed the base's context.
    """
    inputs = {"input_ids": torch.tensor([_repeated(x, length)], device=base.device)}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([_repeated(y or x, length)], device=base.device)
    with capture(base.model) as seen:
        # no logits; and where a prefix is attached meanwhile, these tokens' positions still count from 0
        base.model.base_model(**inputs, use_cache=False)
    return {
        section: matrix_of([(layers[i][0][0], layers[i][1][0]) for i in range(len(layers))]).float().cpu()
        for section, layers in seen.items()
    }


def trainable_prefix(
    base: Base,
    *,
    length: int,
    reparametrization: Reparametrization,
    hidden: int | None = None,
    start: Prefix | tuple[Sequence[int], Sequence[int]] | None = None,
    seed: int = 0,
) -> TrainablePrefix:
    """Make what is trained.

    Args:
        base: the frozen base.
        length: P; where `start` is a prefix, that one's length is taken.
        reparametrization: "direct", "mlp" or "embedding".
        hidden: hidden size of the MLP; by default 512, and 800 for 100 virtual tokens or more, as in the paper.
        start: a prefix to go on from; or token ids (x, y) whose activations are taken; or None for small noise.
        seed: of the noise.

    Raises:
        SettingsError: settings that exclude each other.
        TooLongError: the base's context has no place for as many virtual tokens.
        WrongBaseError: the prefix to start from is another base's.
    """
    if not isinstance(start, Prefix) and base.context is not None and length >= base.context:
        raise TooLongError(
            f"expected a length below the base's context of {base.context}; got {length}: take a shorter prefix"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the other devices' too
        if reparametrization == "embedding":
            if isinstance(start, Prefix):
                raise SettingsError("a saved prefix has no embeddings to go on from: use 'direct' or 'mlp'")
            return EmbeddingPrefix(base, length, None if start is None else start[0])
        matrices: Matrices | None = None
        if isinstance(start, Prefix):
            matrices, length = matrices_of(start.check(base)), start.length
        elif start is not None:
            matrices = activations(base, *start, length)
        if reparametrization == "direct":
            return DirectPrefix(base.shapes, length, matrices)
        assert reparametrization == "mlp"
        hidden = hidden or (512 if length < 100 else 800)
        return MLPPrefix(base.shapes, length, base.model.config.hidden_size, hidden, matrices)
