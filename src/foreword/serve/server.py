"""The process: an application on a socket, until it is told to stop."""

from __future__ import annotations

import errno
import ipaddress
import socket
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from foreword.errors import SettingsError
from foreword.serve.service import Service

__all__ = ["check_address", "check_port", "run"]

LAST_SECONDS = 5
"""After the time of grace, for errors to reach the clients."""


def check_address(host: str, *, keys: bool) -> None:
    """Raise `SettingsError` where others could come to a server that asks for no keys."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or keys):
        raise SettingsError(
            f"expected API keys where others can reach the server, at {host}: make some with foreword keys add and give "
            "--keys FILE, or stay on 127.0.0.1"
        )


def check_port(host: str, port: int) -> None:
    """Raise `SettingsError` where nothing can be served there, as long as that is so."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise SettingsError(
            f"cannot listen on port {port} of {host!r} ({error.strerror}): give another with {other}"
        ) from None


class _Server(uvicorn.Server):
    """Tells the service of a signal at once, so that texts end or are cut off before the sockets are closed."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.stop_soon()
        super().handle_exit(sig, frame)


def run(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000) -> bool:
    """Serve until SIGTERM or SIGINT; texts under way have the time of grace to end.

    Args:
        app: made by `create_app`.
        host, port: where to listen; port 0 for any, which the log tells.

    Returns:
        whether it was served; the log says why it was not.

    Raises:
        SettingsError: others could come to the address, and no keys are asked for.
        whatever kept the engine from starting.
    """
    service: Service = app.state.service
    check_address(host, keys=service.keys is not None)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.settings.grace) + LAST_SECONDS,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config, service)
    service.on_failure = partial(setattr, server, "should_exit", True)
    server.run()
    if service.failure is not None:
        raise service.failure
    return server.started
