"""Requests and answers, in the shapes of OpenAI's API, and with what foreword adds to them.

What would do nothing here is refused, not passed over: of OpenAI's fields that change an answer and that are not
supported, the value that changes nothing is taken, and null is as good as nothing everywhere.

A body of megabytes may be wrong in each of its elements, so what is looked for is the first error of a list, no more.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["KINDS", "ChatRequest", "CompletionRequest"]

MAX_TEXTS = 128
"""Texts that one request may ask for: its prompts times n."""

COLDEST = 0.01
"""Below it the most likely token is taken."""
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Zero = Annotated[float, Field(ge=0, le=0)]
Model = Annotated[str, Field(description="A prefix's name; the base's name for no prefix.")]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MAX_COLUMNS = 100
MAX_PARTS = 100


TEXT, TEXTS, TOKENS, LISTS, PARTS = KINDS = (
    "a text",
    "a list of texts",
    "token ids",
    "lists of token ids",
    "text parts",
)
"""What a field of several kinds may be. An error tells the kind that it looks like, and its place has that in it."""


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return {int: TOKENS, float: TOKENS, list: LISTS, dict: PARTS}.get(type(first), TEXTS)


def _one_of(*kinds: str) -> Discriminator:
    words = f"expected {', '.join(kinds[:-1])} or {kinds[-1]}"
    return Discriminator(_kind, custom_error_type="kind", custom_error_message=words)


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("kind", f"expected {TEXT} or {TEXTS}")
    return [value] if isinstance(value, str) else value


def _columns(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    set_ = {name: one for name, one in value.items() if one is not None}
    if len(set_) > MAX_COLUMNS:
        raise PydanticCustomError("columns", f"expected at most {MAX_COLUMNS} columns; got {len(set_)}")
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in set_.values()):
        raise PydanticCustomError("columns", "expected a text or a number in each column")
    return set_


class _Given(BaseModel):
    """A part of a request. What it has too much is an error, of which one is told; "3" and true are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _tidied(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        set_ = {name: value for name, value in given.items() if value is not None}
        # JSON has one kind of numbers: 3.0 is an integer, too
        set_ = {
            name: int(value) if type(value) is float and value.is_integer() else value for name, value in set_.items()
        }
        unknown = next((name for name in set_ if name not in cls.model_fields), None)
        return {name: value for name, value in set_.items() if name in cls.model_fields or name == unknown}


class StreamOptions(_Given):
    include_usage: bool = False
    include_obfuscation: Literal[False] = Field(False, description="Not supported.")


class _Shared(_Given):
    """What both kinds of requests have."""

    model: Model
    n: int = Field(1, ge=1, le=MAX_TEXTS)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            list[Stop],
            Field(max_length=16, fail_fast=True),
            BeforeValidator(_listed, json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=16)]),
        ]
        | None
    ) = Field(None, description="A string, or a list of them.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Zero = Field(0, description="0 alone: not supported.")
    frequency_penalty: Zero = Field(0, description="0 alone: not supported.")
    logit_bias: Annotated[dict[Any, Any], Field(max_length=0)] | None = Field(None, description="Not supported.")
    user: str | None = Field(None, description="Taken, and not used.")

    @property
    def how(self) -> dict[str, Any]:
        """What `Sampling` takes of these fields."""
        stop = tuple(self.stop or ())
        # logits divided by less overflow, or are no logits any more; and of no share of the tokens the likeliest is left
        temperature = self.temperature if self.temperature >= COLDEST and self.top_p else 0.0
        return {"temperature": temperature, "top_p": self.top_p or 1.0, "seed": self.seed, "stop": stop}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Shared):
    """A request to /v1/completions. `prompt` is framed as the prefix was trained, unless it is token ids."""

    prompt: Annotated[
        Annotated[str, Tag(TEXT)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True), Tag(TEXTS)]
        | Annotated[TokenIds, Tag(TOKENS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True), Tag(LISTS)],
        _one_of(TEXT, TEXTS, TOKENS, LISTS),
    ]
    max_tokens: int = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = Field(False, description="Not supported.")
    suffix: None = Field(None, description="Not supported.")
    best_of: int | None = Field(None, description="The same as n, or nothing.")
    frame: bool = Field(
        True,
        description="foreword's own: whether the prompt is framed by the prefix's template; false takes it as it is.",
    )
    record: Annotated[dict[str, str | int | float], BeforeValidator(_columns)] | None = Field(
        None, description="foreword's own: columns that the prefix's template names, beside `input`, the prompt."
    )


class TextPart(_Given):
    type: Literal["text"]
    text: str


class Message(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(TEXT)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag(PARTS)],
        _one_of(TEXT, PARTS),
    ]
    name: None = Field(None, description="Not supported.")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Given):
    type: Literal["text"]


class ChatRequest(_Shared):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="By default what the context leaves.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The same as max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = Field(None, description="Text alone.")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(None, description="Text alone.")
    store: Literal[False] = Field(False, description="Not supported.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")


class Usage(BaseModel):
    """Tokens of x and y; virtual tokens are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error."""

    error: ErrorDetail


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class PrefixInfo(BaseModel):
    name: str
    sha256: str
    created: int
    object: Literal["prefix"] = "prefix"


class PrefixList(BaseModel):
    """Prefixes sorted by name; `cursor` is the next request's `after`, null at the end."""

    object: Literal["list"] = "list"
    data: list[PrefixInfo]
    cursor: str | None


class Deleted(BaseModel):
    name: str
    versions: int
    deleted: Literal[True] = True
