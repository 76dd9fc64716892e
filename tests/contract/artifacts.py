"""A tiny LoRA artifact for the fake engine's base, and how a client uploads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save

from hatrack.manifest import CONFIG_FILE, WEIGHTS_FILE
from hatrack.v1 import adapters_pb2 as pb

RANK = 2
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def lora(*, fill: float = 0.5, **config: Any) -> dict[str, bytes]:
    """The files of an artifact; `fill` tells versions apart."""
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    tensors = {KEY.format("A"): np.full((RANK, 8), fill, np.float32), KEY.format("B"): np.ones((8, RANK), np.float32)}
    return {CONFIG_FILE: json.dumps(settings).encode(), WEIGHTS_FILE: save(tensors)}


def header(name: str, files: dict[str, bytes], *, stage: bool = False) -> pb.UploadAdapterRequest:
    declared = [
        pb.UploadFile(name=file, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for file, content in files.items()
    ]
    return pb.UploadAdapterRequest(header=pb.UploadHeader(name=name, files=declared, stage=stage))


def upload(name: str, files: dict[str, bytes], *, stage: bool = False) -> Iterator[pb.UploadAdapterRequest]:
    """The messages of one upload, cut into chunks that cross the borders of files."""
    yield header(name, files, stage=stage)
    content = b"".join(files.values())
    for start in range(0, len(content), 100):
        yield pb.UploadAdapterRequest(chunk=content[start : start + 100])
