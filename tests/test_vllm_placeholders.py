"""What a request says to the connector, without vLLM."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from foreword.errors import SettingsError, StoreError
from foreword.serve.placeholders import (
    cache_salt,
    completion_fields,
    kv_transfer_config,
    kv_transfer_params,
    parse_kv_transfer_params,
    placeholder_ids,
)
from foreword.store import Version

SHA = hashlib.sha256(b"a").hexdigest()
OTHER = hashlib.sha256(b"b").hexdigest()
VERSION = Version(name="Éva/7", stamp=1, id="00000000", sha256=SHA)


def test_ids_stand_for_the_content() -> None:
    ids = placeholder_ids(SHA, 197, 49152)
    assert len(ids) == 197
    assert all(0 <= i < 49152 for i in ids)
    assert len(set(ids)) > 180
    assert max(ids) > 45000
    assert ids == placeholder_ids(SHA, 197, 49152)
    assert ids[:11] == placeholder_ids(SHA, 11, 49152)
    assert sum(a == b for a, b in zip(ids, placeholder_ids(OTHER, 197, 49152), strict=True)) < 5
    # clients may have made theirs with an earlier version
    assert placeholder_ids(SHA, 3, 263) == [119, 96, 182]


def test_salts_differ_as_contents_do() -> None:
    assert cache_salt(SHA) == cache_salt(SHA)
    assert cache_salt(SHA) != cache_salt(OTHER)


def test_fields_of_a_completion() -> None:
    fields = completion_fields(VERSION, 5, (7, 8, 9), 263)
    assert fields["prompt"] == [*placeholder_ids(SHA, 5, 263), 7, 8, 9]
    assert fields["cache_salt"] == cache_salt(SHA)
    told = json.loads(json.dumps(fields["kv_transfer_params"]))
    assert parse_kv_transfer_params(told) == ("Éva/7", SHA)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"foreword": "Éva"},
        {"foreword": {"name": "Éva"}},
        {"foreword": {"name": "Éva", "sha256": SHA, "more": 1}},
        {"do_remote_prefill": True, **kv_transfer_params(VERSION)},
    ],
)
def test_params_of_another_form_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"expected kv_transfer_params of the form .*; got .*: make them with"):
        parse_kv_transfer_params(params)


@pytest.mark.parametrize("sha256", [SHA[:63], SHA.upper(), "g" * 64, None, 7])
def test_half_a_hash_is_refused(sha256: object) -> None:
    with pytest.raises(SettingsError, match="expected a sha256 of 64 hexadecimal digits"):
        parse_kv_transfer_params({"foreword": {"name": "Éva", "sha256": sha256}})


def test_a_name_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(StoreError, match="expected a name"):
        parse_kv_transfer_params({"foreword": {"name": "a\n", "sha256": SHA}})


def test_config_is_json_and_fails_closed() -> None:
    config = json.loads(json.dumps(kv_transfer_config("/store", "0" * 64, base="b", budget=5)))
    assert config["kv_load_failure_policy"] == "fail"
    assert config["kv_connector_extra_config"] == {"store": "/store", "fingerprint": "0" * 64, "base": "b", "budget": 5}


def test_imports_no_vllm() -> None:
    code = "import sys, foreword.serve.placeholders; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
