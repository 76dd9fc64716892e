"""The options that every command of the client takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Server = Annotated[str, typer.Option(envvar="HATRACK_SERVER", metavar="HOST:PORT", help="The server's address.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="HATRACK_API_KEY", metavar="KEY", help="The tenant's key.", show_default=False)
]
Tls = Annotated[bool, typer.Option("--tls", help="Use TLS, trusting the system's certificates.")]
TlsCa = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Use TLS, trusting these certificates (PEM).", show_default=False)
]
