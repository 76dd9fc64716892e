"""TLS whose certificate can be renewed while the server runs."""

from __future__ import annotations

from pathlib import Path

import grpc
import structlog

from hatrack_server.errors import StartupError

log = structlog.get_logger(__name__)


def credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    """Credentials that take up changed files with the next connection; raises StartupError when one can't be read."""
    try:
        pair = (key.read_bytes(), certificate.read_bytes())
    except OSError as error:
        raise StartupError(f"can't read {error.filename}: {error.strerror}") from None
    return grpc.dynamic_ssl_server_credentials(
        grpc.ssl_server_certificate_configuration([pair]),
        _Reloading(certificate, key, pair),  # type: ignore[arg-type]  # the stub doesn't know that None is allowed
    )


class _Reloading:
    """Called by gRPC for each connection; None keeps the certificate that is there."""

    def __init__(self, certificate: Path, key: Path, pair: tuple[bytes, bytes]) -> None:
        self._certificate = certificate
        self._key = key
        self._pair = pair

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            pair = (self._key.read_bytes(), self._certificate.read_bytes())
        except OSError:
            # A renewal may replace one file after the other, or fail: what works goes on.
            log.warning("certificate not readable, keeping the one in use")
            return None
        if pair == self._pair:
            return None
        self._pair = pair
        return grpc.ssl_server_certificate_configuration([pair])
