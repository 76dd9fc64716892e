"""Where the server is and how to speak to it; shared by both clients."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from hatrack_client.errors import InvalidArgument

DEFAULT_SERVER = "127.0.0.1:50051"

_OPTIONS = [("grpc.primary_user_agent", "hatrack-client")]
_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[^\s\[\]]+\]):([0-9]{1,5})")
_API_KEY = re.compile(r"[!-~]+")  # visible ASCII, which is what a header can carry


@dataclass(frozen=True, slots=True)
class Connection:
    """An address, a credential and the transport; opens nothing by itself.

    Raises InvalidArgument for an address or a key that no server can have: gRPC would try, and fail obscurely.
    """

    server: str
    api_key: str | None = field(repr=False)
    tls: bool
    tls_ca: Path | None  # PEM certificates to trust instead of the system's; implies TLS

    def __post_init__(self) -> None:
        address = _ADDRESS.fullmatch(self.server)
        if address is None or not 0 < int(address[1]) < 65536:
            raise InvalidArgument(f"must be HOST:PORT (got {self.server!r})", field="server")
        if self.api_key and not _API_KEY.fullmatch(self.api_key):
            raise InvalidArgument("must be ASCII without spaces and line breaks", field="api_key")

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
            # gRPC alone would find out at the first call, and say that the server can't be reached.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=self.tls_ca)
            return grpc.ssl_channel_credentials(root_certificates=self.tls_ca.read_bytes())
        except ssl.SSLError:
            raise InvalidArgument(f"{self.tls_ca} holds no certificate", field="tls_ca") from None
        except OSError as error:
            raise InvalidArgument(f"{self.tls_ca}: {error.strerror}", field="tls_ca") from error
