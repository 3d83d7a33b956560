"""The commands that serve: the server, and who may use it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword import terminal as t
from foreword.errors import MissingExtraError, SettingsError
from foreword.terminal import err, out, shown

if TYPE_CHECKING:
    from foreword.serve.access import Key, KeyFile

__all__ = ["keys_app", "serve"]

MIB = 1 << 20
EXTRA = ("fastapi", "uvicorn", "prometheus_client")

KeysName = Annotated[Path, typer.Argument(metavar="FILE", help="The file of keys.")]


def serve(
    base: t.BaseName,
    prefixes: Annotated[str, typer.Option(metavar="STORE", help="The store: a folder, or a URL that fsspec knows.")],
    engine: Annotated[str, typer.Option(help="auto, local or vllm.")] = "auto",
    host: Annotated[str, typer.Option(help="Where to listen; other addresses than this machine's own need --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 for any free one.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys (see foreword keys); by default none are asked for.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What requests call the base; by default its name, without folders.")
    ] = None,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts under way at once; more are told to come back.")] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for one request, waiting and reading included.")
    ] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for texts to end when the server is stopped.")] = 30.0,
    max_upload: Annotated[int, typer.Option(min=1, help="Largest prefix file that is taken, in MiB.")] = 256,
    prefix_memory: Annotated[int, typer.Option(min=1, help="Memory of the prefixes, in MiB.")] = 1024,
    cache_memory: Annotated[
        int, typer.Option(min=1, help="Memory of the rows' keys and values, in MiB; local, and vllm on a CPU.")
    ] = 2048,
    max_rows: Annotated[int, typer.Option(min=1, help="Texts computed at once; local.")] = 32,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share each layer; vllm.")] = 1,
    vllm_options: Annotated[str | None, typer.Option(help="More of vLLM's engine arguments, as JSON.")] = None,
    dtype: t.Dtype = "auto",
    device: t.Device = None,
) -> None:
    """Serve a base and the prefixes of a store, as OpenAI's clients expect.

    A request's model names the prefix; the base's name means none. SIGTERM ends it when the texts under way have ended.
    Logs are JSON, a line an event, on stderr.
    """
    for package in EXTRA:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("serve", package)

    from foreword.serve.access import KeyFile
    from foreword.serve.choose import choose_engine
    from foreword.serve.http import create_app
    from foreword.serve.logs import log_as_json
    from foreword.serve.server import LAST_SECONDS, check_address, check_port, run
    from foreword.serve.service import Settings
    from foreword.serve.waiting import leave_hung_threads
    from foreword.store import Store

    # whatever can be wrong is looked at before the base, which may be large, is loaded
    settings = Settings(max_texts=max_texts, timeout=timeout, grace=grace, max_upload=max_upload * MIB)
    check_address(host, keys=keys is not None)
    check_port(host, port)
    key_file = None if keys is None else KeyFile(keys)
    if key_file is not None and not key_file.known():
        raise SettingsError(f"expected API keys in {keys}; there are none: make one with foreword keys add {keys}")
    store = Store(prefixes)
    log_as_json()
    loaded, made = choose_engine(
        engine,
        base,
        store,
        dtype=dtype,
        device=device,
        prefix_bytes=prefix_memory * MIB,
        cache_bytes=cache_memory * MIB,
        max_rows=max_rows,
        ranks=ranks,
        vllm_options=_options(vllm_options),
    )
    app = create_app(loaded, store, engine=made, keys=key_file, base_name=base_name, settings=settings)
    served = run(app, host=host, port=port)
    leave_hung_threads(LAST_SECONDS, 0 if served else 1)
    if not served:
        raise typer.Exit(1)


def _options(text: str | None) -> dict[str, Any]:
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise SettingsError(f"expected --vllm-options as a JSON object; got {text!r}")
    return options


keys_app = typer.Typer(help="Look after the API keys of a server.", no_args_is_help=True, rich_markup_mode=None)


def _open(path: Path, *, there: bool) -> KeyFile:
    from foreword.serve.access import KeyFile

    if there and not path.exists():
        raise SettingsError(f"no file of keys at {path}: check the path, or make one with foreword keys add {path}")
    return KeyFile(path)


def _may_use(key: Key) -> str:
    return "all, as an admin" if key.admin else ", ".join(key.prefixes) or "the base alone"


@keys_app.command()
def add(
    file: KeysName,
    prefix: Annotated[
        list[str] | None,
        typer.Option(help="A name it may use, where * is any characters; again for more. The base needs none."),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may use, upload and delete all.")] = False,
    label: Annotated[str, typer.Option(help="Whose it is, for people.")] = "",
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="By default no limit.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Texts at once; by default no limit.")] = None,
) -> None:
    """Make a key and print it, once: the file keeps only its hash. A running server takes it within seconds."""
    key, text = _open(file, there=False).add(
        label=label,
        prefixes=tuple(prefix or ()),
        admin=admin,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
    )
    typer.echo(text)
    err.print(shown(f"{key.id} may use: {_may_use(key)}"))


@keys_app.command()
def ls(
    file: KeysName, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a key.")] = False
) -> None:
    """List keys, the oldest first."""
    for key in _open(file, there=True).known():
        if as_json:
            facts = {name: value for name, value in dataclasses.asdict(key).items() if name != "sha256"}
            typer.echo(json.dumps(facts, ensure_ascii=False))
            continue
        limits = [
            f"{value:,} {unit}"
            for value, unit in ((key.tokens_per_minute, "tokens/min"), (key.concurrency, "at once"))
            if value is not None
        ]
        out.print(shown("  ".join(filter(None, [key.id, key.created, key.label, _may_use(key), *limits]))))


@keys_app.command()
def rm(
    file: KeysName,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The keys' ids, as ls prints them.")],
) -> None:
    """Remove keys. A running server refuses them within seconds."""
    opened = _open(file, there=True)
    for id in ids:
        key = opened.remove(id)
        out.print(shown("  ".join(filter(None, [key.id, key.label, "removed"]))))
