"""Requests that nobody would think of, made from the OpenAPI document: none makes the server fail."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import chat_base, prefix_for, served

from foreword.serve import FakeEngine, create_app
from foreword.store import Store

EXAMPLES = int(os.environ.get("FOREWORD_FUZZ", "60"))
"""For each operation, in the slow search; set it to 1000 for a long one."""


def nearer(case: Any, n: int, file: bytes) -> None:
    """Make as much of a request right as lets it get further."""
    name = ("plain", "chat")[n % 2]
    case.path_parameters = dict.fromkeys(case.path_parameters, name)
    if case.method == "PUT":
        case.body = file
    elif isinstance(case.body, dict):
        if n % 3:
            case.body = {key: case.body[key] for key in ("prompt", "messages") if key in case.body}
        if case.body.get("messages"):
            case.body["messages"][-1]["role"], name = "user", "chat"
        case.body["model"] = name


@pytest.mark.parametrize("examples", [6, pytest.param(EXAMPLES, marks=pytest.mark.slow)])
def test_no_request_whatever_makes_the_server_fail(tmp_path: Path, examples: int) -> None:
    # seconds, which the processes that run other tests need not spend
    import hypothesis
    import schemathesis

    base = chat_base()
    store = Store(tmp_path / "store", create=True)
    plain = prefix_for(base, 5)
    app = create_app(base, store, engine=FakeEngine())
    seen: dict[int, int] = {}
    answered: set[str] = set()
    count = itertools.count()
    with served(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 11

        for operation in operations:
            store.put("plain", plain)
            store.put("chat", prefix_for(base, 4, chat=True))

            @hypothesis.given(case=operation.as_strategy())
            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            def fuzz(case: Any) -> None:
                n = next(count)
                if n % 2:
                    nearer(case, n // 2, plain.to_bytes())
                response = case.call()
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
                if response.status_code < 300:
                    answered.add(case.operation.label)
                assert response.status_code < 500, (case, response.text)
                case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

            fuzz()
        assert httpx.get(f"{url}/health").status_code == 200
    assert seen.get(200, 0) > examples
    assert answered == {operation.label for operation in operations}
    assert seen.get(400, 0) + seen.get(404, 0) > examples
