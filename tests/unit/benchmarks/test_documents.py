"""What the documents say, and that figures and tables can be made of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import plots
import pytest
from serving import Limits, limits_found, summarize
from setting import as_document
from tables import as_markdown
from traffic import percentiles
from workload import Case, Measurement

CASES = [Case(1, 0), Case(1, 1)]
TIMES = percentiles([0.01, 0.02])
ARGUMENTS = argparse.Namespace(shape="tiny", device="cpu", threads=2)


def results(vllm: bool = True) -> list[dict[str, Any]]:
    runs = {
        "hatrack": [[Measurement(10, 0.5), Measurement(14, 0.5)]],
        "peft": [[Measurement(20, 1), Measurement(42, 2)]],
    }
    if vllm:
        runs["vllm"] = [[Measurement(5, 1), Measurement(7, 1)]]
    return summarize(CASES, runs, Limits(read_bytes_per_s=1e9, step_bytes=5_000_000, adapter_bytes=2_000_000))


def serving() -> dict[str, Any]:
    limits = Limits(read_bytes_per_s=1e9, step_bytes=5_000_000, adapter_bytes=2_000_000)
    return as_document("serving", ARGUMENTS, {"limits": limits_found(limits), "cases": results()})


def many_adapters() -> dict[str, Any]:
    phase = {"name": "5 adapters", "adapters": 5, "popularity": "zipf", "clients": 8, "rate": None, "tokens_per_s": 9.5}
    phase |= {"distinct": 5, "resident_programs": 5, "evictions": 0, "first_token_ms": TIMES, "inter_token_ms": TIMES}
    found = {"registered": 5, "phases": [phase, phase | {"rate": 1.5}]}
    ratios = {"ratios": {"many_over_few": {"throughput": 0.95}}, "bars": {"many_over_few": {"throughput": 0.9}}}
    return as_document("many_adapters", ARGUMENTS, found | ratios)


def adapter_loading() -> dict[str, Any]:
    neighbour = {
        "quiet": TIMES,
        "resident": TIMES,
        "loads": TIMES,
        **{key: {"p95": 1.0, "max": 1.0} for key in ("ratio", "over_resident")},
    }
    times = dict.fromkeys(("load_ms", "first_token_ms", "resident_first_token_ms"), TIMES)
    tier = {"tier": "page cache", "loads": 2, "neighbour": neighbour, **times}
    return as_document("adapter_loading", ARGUMENTS, {"adapter_bytes": 10, "tiers": [tier]})


def test_ratios_are_above_one_where_hatrack_is_faster() -> None:
    base, adapted = results()
    assert base["ratio"] == {"peft": {"decode": 2, "prefill": 2}, "vllm": {"decode": 0.5, "prefill": 2}}
    assert adapted["ratio"]["peft"] == {"decode": 3, "prefill": 4}
    assert set(results(vllm=False)[0]["ratio"]) == {"peft"}


def test_each_case_is_held_against_the_base_and_the_memory() -> None:
    base, adapted = results()
    assert base["weights_share"] == 0.5  # 5 MB at 1 GB/s, of 10 ms
    assert adapted["slowdown"] == {"hatrack": 1.4, "peft": 2.1, "vllm": 1.4}
    assert adapted["added_over_read"] == 2  # 4 ms, for 2 MB


def kernels() -> dict[str, Any]:
    case = {"kernel": "low_rank", "us": 3.0, "limit_us": 1.5, "share": 0.5, "reference_us": None}
    return {"benchmark": "kernels", "machine": {"bytes_per_s": 1.0}, "cases": [case]}


@pytest.mark.parametrize(
    ("document", "files"),
    [
        (kernels, []),
        (serving, ["now.svg"]),
        (many_adapters, ["now.svg", "now_first_token.svg"]),
        (adapter_loading, ["now.svg", "now_neighbour.svg"]),
    ],
)
def test_a_document_becomes_figures_and_tables(document: Any, files: list[str], tmp_path: Path) -> None:
    made = document()
    assert plots.draw(made, tmp_path / "now") == files
    assert all(f"tiny on {made['machine'].get('cpu')}" in (tmp_path / file).read_text() for file in files)
    page = as_markdown({"now": made}, {"now": files})
    assert all(f"({file})" in page for file in files)
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert tables
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_equal_documents_give_equal_figures(tmp_path: Path) -> None:
    for name in ("one", "two"):
        plots.draw(serving(), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
