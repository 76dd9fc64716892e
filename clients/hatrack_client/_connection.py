"""Where the server is and how to speak to it; shared by both clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from hatrack_client.errors import InvalidArgument

DEFAULT_SERVER = "127.0.0.1:50051"

_OPTIONS = [("grpc.primary_user_agent", "hatrack-client")]


@dataclass(frozen=True, slots=True)
class Connection:
    """An address, a credential and the transport; opens nothing by itself."""

    server: str
    api_key: str | None = field(repr=False)
    tls: bool
    tls_ca: Path | None  # PEM certificates to trust instead of the system's; implies TLS

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def open(self) -> grpc.Channel:
        """A channel of the synchronous API; raises InvalidArgument when the certificates can't be read."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.server, _OPTIONS)
        return grpc.secure_channel(self.server, credentials, _OPTIONS)

    def open_aio(self) -> grpc.aio.Channel:
        """A channel of the asyncio API; raises as `open` does."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.server, _OPTIONS)
        return grpc.aio.secure_channel(self.server, credentials, _OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls_ca is None:
            return grpc.ssl_channel_credentials() if self.tls else None
        try:
            return grpc.ssl_channel_credentials(root_certificates=self.tls_ca.read_bytes())
        except OSError as error:
            raise InvalidArgument(f"{self.tls_ca}: {error.strerror}", field="tls_ca") from error
