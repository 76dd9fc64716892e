"""The server's configuration: frozen, and validated once. Command line and YAML file both end here."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EngineConfig(BaseModel):
    """What the engine's process needs; crosses to it by pickle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """A local checkpoint; a hub id has been resolved to one by then."""
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; auto is bfloat16 with NF4, else the checkpoint's own."""
    packed: bool = True
    """Let kernels repack NF4 weights into their fastest layout (rounds block scales to bf16). Off for exact float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    """torch's threads; None: torch's own choice."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt and completion together, in tokens; None: the checkpoint's limit, at most what the KV cache holds."""
    kv_cache_gb: float = Field(default=1.0, gt=0)
    """Memory of the KV cache, in 1e9 bytes."""
    block_size: int = Field(default=16, ge=1)
    """Tokens per KV block."""
    adapter_gb: float = Field(default=1.0, gt=0)
    """Memory of resident adapters, in 1e9 bytes."""
    host_adapter_gb: float = Field(default=1.0, ge=0)
    """Memory for copies of evicted adapters, in 1e9 bytes; none is taken before the first is evicted. 0: none."""
    max_rows: int = Field(default=64, ge=1)
    """Sequences in one step."""
    max_step_tokens: int = Field(default=512, ge=1)
    """Tokens in one step: prompts are prefilled in chunks that fit beside the running decodes."""
    max_waiting: int = Field(default=1024, ge=1)
    """Sequences that may wait for admission; one more is refused."""
    async_scheduling: bool | None = None
    """Start the next step before the last one's tokens are waited for. None: on a GPU; a CPU gains nothing by it."""
    cuda_graphs: bool = True
    """On a GPU, record the launches of decodes, and replay them. What the largest ones compute on the way, and what
    each of them gives, takes memory beside what is set here: for an 8B model an estimated gigabyte."""
    max_rank: int = Field(default=256, ge=1)
    prefix_cache: bool = True

    @model_validator(mode="after")
    def _rows_fit_a_step(self) -> Self:
        if self.max_rows > self.max_step_tokens:
            raise ValueError(f"max_rows ({self.max_rows}) must not exceed max_step_tokens ({self.max_step_tokens})")
        return self


class ServerConfig(BaseModel):
    """Everything that `hatrack serve` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    """0 takes a free one."""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """0 takes a free one."""
    metrics_host: str = "127.0.0.1"
    """Metrics are plain HTTP without a key and name tenants, so they don't follow `host`."""
    data_dir: Path = Path("hatrack-data")
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    """Allow an address beyond loopback without TLS; keys are needed all the same."""
    max_upload_bytes: int = Field(default=2_000_000_000, ge=1)
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long SIGTERM lets requests in flight go on."""

    @model_validator(mode="after")
    def _transport_is_safe(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if not self.loopback and self.tls_cert is None and not self.insecure:
            raise ValueError(f"host {self.host} is not loopback: give tls_cert and tls_key, or insecure")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
