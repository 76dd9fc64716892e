from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from contract.fake_engine import FakeEngine
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hatrack.v1 import inference_pb2 as pb
from hatrack.v1.inference_pb2_grpc import InferenceServiceStub
from hatrack_server.api.server import ApiServer
from hatrack_server.api.tls import credentials
from hatrack_server.catalog import Catalog
from hatrack_server.config import EngineConfig, ServerConfig
from hatrack_server.errors import StartupError
from hatrack_server.metrics import Metrics
from hatrack_server.tenancy.keys import KeyStore
from hatrack_server.text.codec import TextCodec


def write_certificate(certificate: Path, key: Path) -> bytes:
    """A fresh self-signed pair for 127.0.0.1; returns the certificate."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hatrack")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    pem = signed.public_bytes(serialization.Encoding.PEM)
    certificate.write_bytes(pem)
    return pem


async def generate(port: int, trusted: bytes) -> None:
    # A session kept from an earlier channel would spare the handshake that is tested here.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel_credentials = grpc.ssl_channel_credentials(trusted)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", channel_credentials, options=options) as channel:
        await InferenceServiceStub(channel).Generate(pb.GenerateRequest(prompt="hi"), timeout=5)


async def test_a_renewed_certificate_is_taken_up(tmp_path: Path, codec: TextCodec) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    old = write_certificate(certificate, key)
    config = ServerConfig(
        engine=EngineConfig(model=tmp_path), port=0, data_dir=tmp_path / "data", tls_cert=certificate, tls_key=key
    )
    keys, catalog = KeyStore(config.data_dir), Catalog(config.data_dir, max_upload_bytes=1000, on_unused=print)
    api = ApiServer(config, engine=FakeEngine(), catalog=catalog, keys=keys, codec=codec, metrics=Metrics())
    port = await api.start()
    await generate(port, old)
    new = write_certificate(certificate, key)
    await generate(port, new)
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(port, old)
    certificate.unlink()
    await generate(port, new)
    await api.stop(1)
    catalog.close()
    keys.close()


def test_an_unreadable_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"can't read .*k.pem: No such file"):
        credentials(tmp_path / "c.pem", tmp_path / "k.pem")
