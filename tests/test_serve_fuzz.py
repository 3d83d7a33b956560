"""Requests that nobody would think of, made from the OpenAPI document: none makes the server fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import prefix_for, reference_base, served

from foreword.serve import FakeEngine, create_app
from foreword.store import Store

EXAMPLES = int(os.environ.get("FOREWORD_FUZZ", "60"))
"""For each operation, in the slow search; set it to 1000 for a long one."""


@pytest.mark.parametrize("examples", [6, pytest.param(EXAMPLES, marks=pytest.mark.slow)])
def test_no_request_whatever_makes_the_server_fail(tmp_path: Path, examples: int) -> None:
    # seconds, which the processes that run other tests need not spend
    import hypothesis
    import schemathesis

    base = reference_base("llama")
    store = Store(tmp_path / "store", create=True)
    names = ["plain", "chat", "tiny-llama"]
    store.put("plain", prefix_for(base, 5))
    store.put("chat", prefix_for(base, 4, chat=True))
    app = create_app(base, store, engine=FakeEngine())
    seen: dict[int, int] = {}
    with served(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 11

        for operation in operations:

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
                if isinstance(case.body, dict) and len(str(case.body)) % 2:
                    # so that it gets further than to "no such model"
                    case.body["model"] = names[len(str(case.body)) % 3]
                response = case.call()
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
                assert response.status_code < 500, (case, response.text)
                case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

            fuzz()
        assert httpx.get(f"{url}/health").status_code == 200
    assert seen.get(200, 0) > examples
    assert seen.get(400, 0) + seen.get(404, 0) > examples
