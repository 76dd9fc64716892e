"""From an artifact's files to pieces, whatever PEFT method made them."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from hatrack.manifest import CONFIG_FILE, WEIGHTS_FILE
from hatrack_server.adapters import methods
from hatrack_server.adapters.base_layers import BaseLayers
from hatrack_server.adapters.pieces import Pieces
from hatrack_server.types import Artifact


def compile_artifact(artifact: Artifact, base: BaseLayers) -> Pieces:
    """Reads and compiles an artifact that has passed the gate; on the CPU, in the files' precision or float32.

    Raises InvalidArtifact when its method is unknown, OSError or safetensors' own error when its files are damaged.
    """
    config = json.loads((artifact.path / CONFIG_FILE).read_text())
    return methods.compile(config, load_file(artifact.path / WEIGHTS_FILE), base)
