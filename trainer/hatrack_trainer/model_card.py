"""The README.md beside an artifact: what it is and how it was made, for whoever finds the folder."""

from __future__ import annotations

from typing import Any

import yaml

from hatrack.manifest import Manifest

CARD = """\
---
{front_matter}
---
# An adapter for {base}

{method}, trained by Hatrack {version} in {steps} steps on {rows} rows of `{file}`; loss {loss}{held_out}.
The base was quantised as `{quantization}` while it learned: {way}.

| setting | value |
| --- | --- |
{settings}

![The loss over the steps](training/loss.svg)

`manifest.json` has the digests of the base, its tokenizer, its chat template and the data.
"""

SERVED = "served on the same, it answers as it did then"
MERGED = "these are weights of its own, of which `hatrack adapters merge` makes a checkpoint"


def model_card(base: str, manifest: Manifest) -> str:
    """The card's text; `base` is the name that the user gave."""
    training: dict[str, Any] = manifest.training
    eval_loss = training.get("eval_loss")
    front_matter = {"library_name": "peft", "base_model": base, "tags": ["hatrack", manifest.method]}
    return CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True).strip(),
        base=base,
        method=manifest.method,
        version=training["libraries"]["hatrack"],
        steps=training["steps"],
        rows=training["data"]["rows"],
        file=training["data"]["file"],
        loss=f"{training['loss']:.4f}",
        held_out="" if eval_loss is None else f", on held-out rows {eval_loss:.4f}",
        quantization=manifest.base.quantization,
        way=MERGED if manifest.method == "PARTIAL" else SERVED,
        settings="\n".join(f"| {name} | {value} |" for name, value in training["settings"].items()),
    )
