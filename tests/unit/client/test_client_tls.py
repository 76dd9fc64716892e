from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hatrack.v1 import inference_pb2_grpc
from hatrack_client import AsyncClient, Client, Unavailable


def self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate for 127.0.0.1, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hatrack")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


@pytest.fixture
def tls_server(server: Any, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The canned server behind TLS: its address, and the certificate to trust."""
    key, certificate = self_signed()
    (tmp_path / "ca.pem").write_bytes(certificate)
    host = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(server, host)
    port = host.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    host.start()
    yield f"127.0.0.1:{port}", tmp_path / "ca.pem"
    host.stop(grace=None).wait()


async def test_a_trusted_certificate_is_enough(tls_server: tuple[str, Path]) -> None:
    address, ca = tls_server
    async with AsyncClient(address, tls_ca=ca) as client:
        assert (await client.generate(prompt="hi")).text == "two hats"


def test_an_unknown_certificate_is_refused(tls_server: tuple[str, Path]) -> None:
    with Client(tls_server[0], tls=True) as client, pytest.raises(Unavailable):
        client.generate(prompt="hi", timeout=10)
