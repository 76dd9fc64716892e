"""The documents' numbers as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

SYSTEMS = ("hatrack", "peft", "vllm")


def as_markdown(documents: Mapping[str, Row], figures: Mapping[str, Sequence[str]]) -> str:
    """A page: for each document where it comes from, its figures and its table."""
    parts = ["# Results", "Made by `benchmarks/plots.py` from the JSON documents beside it; don't edit."]
    for name, document in documents.items():
        parts += [f"## {name}", setting(document), *(f"![{name}]({file})" for file in figures[name])]
        parts += [table(rows) for rows in TABLES[document["benchmark"]](document)]
    return "\n\n".join(parts) + "\n"


def setting(document: Row) -> str:
    """Machine, shape and date, as far as the document says."""
    machine = document["machine"]
    known = [document.get("shape"), *machine.values()] if "cpu" in machine else []
    return " · ".join(str(each) for each in [*known, document.get("date")] if each)


def table(rows: Sequence[Row]) -> str:
    """A column for each key of the first row."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *(["" if cell is None else cell for cell in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def serving(document: Row) -> list[list[Row]]:
    """Every case, and the limits."""
    cases = document["cases"]
    systems = [name for name in SYSTEMS if name in cases[0]]
    rows = []
    for case in cases:
        row = {"rows x adapters": f"{case['rows']} x {case['distinct'] or 'base'}"}
        for name in systems:
            row |= {f"{name}: step, ms": case[name]["step_ms"], f"{name}: prefill, s": case[name]["prefill_s"]}
        for name, ratio in case["ratio"].items():
            row |= {f"times {name}: decode": ratio["decode"], f"times {name}: prefill": ratio["prefill"]}
        row |= {f"{name}: slowdown": case.get("slowdown", {}).get(name, "") for name in systems}
        rows.append(row | {key: case.get(key, "") for key in ("weights_share", "added_over_read")})
    return [rows, [document["limits"]]]


def mix(document: Row) -> list[list[Row]]:
    """Both batches."""
    return [[{"case": case["case"]} | case["hatrack"] for case in document["cases"]], [document["ratio"]]]


def many_adapters(document: Row) -> list[list[Row]]:
    """Every phase, then each comparison beside its bar."""
    phases = []
    for phase in document["phases"]:
        load = f"{phase['rate']} requests/s" if phase["rate"] else f"{phase['clients']} clients"
        row = {"": phase["name"], "popularity": phase["popularity"], "load": load, "tokens/s": phase["tokens_per_s"]}
        for key, name in (("first_token_ms", "first token, ms"), ("inter_token_ms", "inter-token, ms")):
            row[f"{name}: p50, p95, p99"] = ", ".join(f"{phase[key][share]:.0f}" for share in ("p50", "p95", "p99"))
        phases.append(row | {key: phase[key] for key in ("distinct", "resident_programs", "evictions")})
    compared = [
        {"comparison": name, "of": key, "ratio": ratio, "bar": document["bars"][name][key]}
        for name, ratios in document.get("ratios", {}).items()
        for key, ratio in ratios.items()
    ]
    return [phases, compared] if compared else [phases]


def adapter_loading(document: Row) -> list[list[Row]]:
    """Every tier, and what its neighbour felt."""
    times = ("load_ms", "first_token_ms", "resident_first_token_ms")
    loads = [
        {"from": tier["tier"], "loads": tier["loads"]}
        | {f"{key}, {share}": tier[key][share] for key in times for share in ("p50", "p95")}
        for tier in document["tiers"]
    ]
    felt = [
        {"from": tier["tier"], "neighbour": state, **found}
        for tier in document["tiers"]
        for state, found in tier["neighbour"].items()
    ]
    return [loads, [{key: row.get(key, "") for key in felt[0]} for row in felt]]


def training(document: Row) -> list[list[Row]]:
    """Both systems, then Hatrack's figures over TRL's beside their bars."""
    systems = [{"system": name} | document[name] for name in ("hatrack", "trl")]
    compared = [
        {"hatrack over trl": key, "ratio": ratio, "bar": document["bars"][key]}
        for key, ratio in document["ratio"].items()
    ]
    return [systems, compared]


def kernels(document: Row) -> list[list[Row]]:
    """As its own table has them."""
    return [document["cases"]]


TABLES: dict[str, Callable[[Row], list[list[Row]]]] = {
    "serving": serving,
    "mix": mix,
    "many_adapters": many_adapters,
    "adapter_loading": adapter_loading,
    "kernels": kernels,
    "training": training,
}
