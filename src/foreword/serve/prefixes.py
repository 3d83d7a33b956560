"""/v1/models, and /v1/prefixes, where admins upload, look at and delete prefixes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Query
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from foreword.data import fields_of
from foreword.errors import NoSuchPrefixError, PrefixFileError, WrongBaseError, one_line
from foreword.prefix import Prefix
from foreword.serve import schemas
from foreword.serve.access import Key, normalized
from foreword.serve.problems import Problem, no_such_model
from foreword.serve.residents import size_of
from foreword.serve.service import Admin, Asking, Service
from foreword.store import Store, Version, check_name

__all__ = ["router"]

PAGE = 1000

router = APIRouter()


def _created(version: Version) -> int:
    return version.stamp // 1_000_000


def _usable(store: Store, key: Key, base_name: str) -> Iterator[Version]:
    """The newest version of every prefix that a key may use, head by head of its patterns."""
    heads = {""} if key.admin else {normalized(pattern).partition("*")[0] for pattern in key.prefixes}
    for head in heads:
        if any(head != other and head.startswith(other) for other in heads):
            continue  # those names come with the other's
        cursor: str | None = ""
        while cursor is not None:
            page = store.page(cursor, PAGE, begins=head)
            yield from (one for one in page.versions if key.may_use(one.name) and one.name != base_name)
            cursor = page.cursor


@router.get("/v1/models", tags=["models"])
async def models(request: HttpRequest, key: Asking) -> schemas.ModelList:
    """The base, and every prefix that the key may use."""
    service: Service = request.app.state.service
    versions = await service.catalog.threads.run(
        lambda: sorted(_usable(service.store, key, service.base_name), key=lambda one: one.name)
    )
    data = [schemas.ModelInfo(id=one.name, created=_created(one), owned_by="foreword") for one in versions]
    return schemas.ModelList(data=[_base_info(service), *data])


def _base_info(service: Service) -> schemas.ModelInfo:
    return schemas.ModelInfo(id=service.base_name, created=service.began, owned_by="base")


@router.get("/v1/models/{model:path}", tags=["models"])
async def model(request: HttpRequest, key: Asking, model: str) -> schemas.ModelInfo:
    """The base, or one prefix."""
    service: Service = request.app.state.service
    if model == service.base_name:
        return _base_info(service)
    version = (await service.entry(key, model)).version
    return schemas.ModelInfo(id=version.name, created=_created(version), owned_by="foreword")


@router.get("/v1/prefixes", tags=["prefixes"])
async def prefixes(
    request: HttpRequest,
    _: Admin,
    after: Annotated[str, Query(description="Names that sort after this one.", max_length=1024)] = "",
    begins: Annotated[str, Query(description="Names that begin so.", max_length=1024)] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE)] = 100,
) -> schemas.PrefixList:
    """A page of all prefixes."""
    service: Service = request.app.state.service
    page = await service.catalog.threads.run(lambda: service.store.page(after, limit, begins=begins))
    return schemas.PrefixList(data=[_info(version) for version in page.versions], cursor=page.cursor)


def _info(version: Version) -> schemas.PrefixInfo:
    return schemas.PrefixInfo(name=version.name, sha256=version.sha256, created=_created(version))


@router.get("/v1/prefixes/{name:path}", tags=["prefixes"])
async def show(request: HttpRequest, key: Admin, name: str) -> Response:
    """A prefix's card, and its versions, the newest first."""
    service: Service = request.app.state.service
    entry = await service.entry(key, name)
    versions = await service.catalog.threads.run(service.store.versions, entry.version.name)
    facts: dict[str, Any] = {
        **_info(entry.version).model_dump(),
        **entry.facts,
        "card": json.loads(entry.card.to_json()),
        "versions": [{"sha256": one.sha256, "created": _created(one)} for one in versions],
    }
    return Response(json.dumps(facts, ensure_ascii=False), media_type="application/json")


def _given(request: HttpRequest, name: str) -> str:
    """The name of a path. Raises `Problem` where its bytes are not UTF-8, which would be another's once they are replaced."""
    try:
        unquote_to_bytes(request.scope.get("raw_path", b"")).decode()
    except UnicodeDecodeError:
        raise Problem(400, "expected a name in UTF-8", param="name") from None
    return check_name(name)


@router.put(
    "/v1/prefixes/{name:path}",
    tags=["prefixes"],
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A prefix file, as it is.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload(request: HttpRequest, _: Admin, name: str) -> schemas.PrefixInfo:
    """Store a prefix file as the newest version of a name."""
    service: Service = request.app.state.service
    name = _given(request, name)
    if name == service.base_name:
        raise Problem(400, f"{name!r} is the base's name: choose another", param="name")
    version = await service.catalog.threads.run(_put, service, name, await request.body())
    service.catalog.forget_name(name)
    return _info(version)


def _put(service: Service, name: str, data: bytes) -> Version:
    """Check all that can be wrong with a file before a byte of it is stored."""
    try:
        prefix = Prefix.from_bytes(data).check(service.base)
    except WrongBaseError:
        # whose message names both, which may be paths
        message = f"expected a prefix of {service.base_name!r}; this one was trained on another base"
        raise Problem(400, message, code="bad_prefix_file") from None
    except PrefixFileError as error:
        raise Problem(400, one_line(error, 1000), code="bad_prefix_file") from None
    if not prefix.card.framing.chat:
        fields_of(prefix.card.framing.template)
    service.engine.room(1, prefix.length)
    budget = service.engine.figures().budget_bytes
    if budget and size_of(prefix) > budget:
        message = (
            f"expected a prefix of at most {budget:,} bytes, the memory that all have together; got {size_of(prefix):,}"
        )
        raise Problem(413, message, code="too_large")
    return service.store.put(name, data)


@router.delete("/v1/prefixes/{name:path}", tags=["prefixes"])
async def delete(request: HttpRequest, _: Admin, name: str) -> schemas.Deleted:
    """Delete every version of a prefix, from memory too. Texts under way come to their end."""
    service: Service = request.app.state.service
    name = _given(request, name)
    versions = await service.catalog.threads.run(service.store.versions, name)
    try:
        count = await service.catalog.threads.run(service.store.delete, name)
    except NoSuchPrefixError:
        raise no_such_model(name) from None
    service.catalog.forget_name(name)
    await service.catalog.forget({version.sha256 for version in versions})
    return schemas.Deleted(name=name, versions=count)
