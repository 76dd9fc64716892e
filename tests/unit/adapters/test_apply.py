from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from hatrack_server.adapters.apply import BatchEffects
from hatrack_server.adapters.pieces import (
    InputScale,
    LowRank,
    OutputLowRank,
    OutputScale,
    OutputShift,
    ReluBottleneck,
    ReplacedHead,
    SoftPrompt,
)
from hatrack_server.adapters.pools import Pools
from hatrack_server.adapters.slots import Slot
from hatrack_server.types import LinearShape

LINEARS = {"q": LinearShape(6, 4), "v": LinearShape(3, 4)}
# Rank by layer of each program: several classes, two of one class, and layers that one of them lacks.
PROGRAMS = [{"q": 4, "v": 4}, {"q": 3, "v": 9}, {"q": 16}, {"v": 4}, {"q": 4, "v": 4}, {}]
Rows = list[tuple[int | None, int]]  # program (None: the base alone), number of tokens
BATCHES: dict[str, Rows] = {
    "every program": [(None, 2), *((n, 1 + n % 3) for n in range(len(PROGRAMS)))],
    "decodes": [(n % len(PROGRAMS), 1) for n in range(13)],
    "neighbours": [(0, 2), (0, 3), (4, 5), (1, 1)],
    "apart": [(0, 2), (None, 1), (0, 2)],
    "base alone": [(None, 3), (None, 1)],
}


class Programs:
    """PROGRAMS with random pieces in pools, as a loading thread would have put them there."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pools = Pools(torch.float32, torch.device("cpu"), budget=1 << 20)
        self.pieces: list[dict[str, LowRank]] = []
        self.slots: list[Slot] = []
        for ranks in PROGRAMS:
            pieces = {
                layer: LowRank(
                    torch.randn(rank, LINEARS[layer].in_features, generator=generator),
                    torch.randn(rank, LINEARS[layer].out_features, generator=generator),
                )
                for layer, rank in ranks.items()
            }
            self.pieces.append(pieces)
            self.slots.append(Slot(pools.place(tuple(pieces.items()))))

    def rows(self, rows: Rows) -> list[tuple[Slot | None, int, int]]:
        """Each at position 7: where, matters to soft prompts alone."""
        return [(None if n is None else self.slots[n], count, 7) for n, count in rows]

    def reference(self, layer: str, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
        """Each row's own product, from its program's pieces."""
        y, start = y.clone(), 0
        for program, count in rows:
            tokens = slice(start, start + count)
            if program is not None and layer in self.pieces[program]:
                piece = self.pieces[program][layer]
                y[tokens] += x[tokens] @ piece.a.mT @ piece.b
            start += count
        return y


@pytest.fixture
def programs() -> Programs:
    return Programs()


def inputs(layer: str, rows: Rows) -> tuple[Tensor, Tensor]:
    tokens, shape = sum(count for _, count in rows), LINEARS[layer]
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(tokens, shape.out_features, generator=generator)
    return y, torch.randn(tokens, shape.in_features, generator=generator)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LINEARS)
def test_each_row_meets_its_own_program(programs: Programs, batch: str, layer: str) -> None:
    rows = BATCHES[batch]
    y, x = inputs(layer, rows)
    wanted = programs.reference(layer, rows, y, x)
    effects = BatchEffects().build(programs.rows(rows))
    if layer in effects:
        effects[layer].output(y, x)
    torch.testing.assert_close(y, wanted)


def test_layers_that_no_row_adapts_have_no_effect(programs: Programs) -> None:
    effects = BatchEffects()
    assert effects.build(programs.rows([(None, 4)])) == {}
    assert effects.build(programs.rows([(5, 4)])) == {}
    assert set(effects.build(programs.rows([(2, 1), (None, 1)]))) == {"q"}


def test_an_equal_batch_reuses_the_effects_and_any_other_builds_them_anew(programs: Programs) -> None:
    effects = BatchEffects()
    rows: Rows = [(0, 1), (1, 1), (None, 1)]
    first = effects.build(programs.rows(rows))
    assert effects.build(programs.rows(rows)) is first
    for other in ([(1, 1), (0, 1), (None, 1)], [(0, 1), (1, 2), (None, 1)], [(0, 1), (1, 1)]):
        assert effects.build(programs.rows(other)) is not first
        effects.build(programs.rows(rows))


def test_a_program_loaded_again_elsewhere_is_another(programs: Programs) -> None:
    effects = BatchEffects()
    old = programs.slots[0]
    first = effects.build([(old, 1, 0)])
    assert effects.build([(Slot(old.places), 1, 0)]) is not first


@pytest.fixture(params=[True, False], ids=["lazy", "dense"])
def lone(request: pytest.FixtureRequest) -> Slot:
    """A program in pools of its own, of one row each."""
    pools = Pools(torch.float32, torch.device("cpu"), 1 << 20, lazy=request.param)
    return Slot(pools.place((("q", LowRank(torch.ones(2, 4), torch.ones(2, 6))),)))


def test_no_stacks_are_kept_that_a_pool_has_left(lone: Slot) -> None:
    effects, [place] = BatchEffects(), lone.places
    first = effects.build([(lone, 1, 0)])
    old = weakref.ref(place.pool.stacks[0])
    place.pool.grow(10**5)
    y, x = torch.zeros(1, 6), torch.ones(1, 4)
    first["q"].output(y, x)
    assert y.tolist() == [[8.0] * 6]
    second = effects.build([(lone, 1, 0)])
    del first
    assert old() is None
    second["q"].output(y, x)
    assert y.tolist() == [[16.0] * 6]


def test_a_batch_of_nothing_keeps_nothing(lone: Slot) -> None:
    effects, [place] = BatchEffects(), lone.places
    effects.build([(lone, 1, 0)])
    old = weakref.ref(place.pool.stacks[0])
    place.pool.free(place.row)
    effects.build([])
    place.pool.grow(10**5)
    assert old() is None


def test_a_batch_that_could_not_be_built_leaves_no_other_in_its_place(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects = BatchEffects()
    first = effects.build(programs.rows([(0, 1)]))
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "bind", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                effects.build(programs.rows([(1, 1)]))
    assert effects.build(programs.rows([(1, 1)])) is not first
    y, x = inputs("q", [(1, 1)])
    wanted = programs.reference("q", [(1, 1)], y, x)
    effects.build(programs.rows([(1, 1)]))["q"].output(y, x)
    torch.testing.assert_close(y, wanted)


def test_a_callers_list_may_change_afterwards(programs: Programs) -> None:
    effects = BatchEffects()
    rows = programs.rows([(0, 1)])
    first = effects.build(rows)
    rows.append((programs.slots[1], 1, 0))
    assert effects.build(rows) is not first


def test_a_bad_program_touches_its_own_rows_only(programs: Programs) -> None:
    rows: Rows = [(0, 1), (4, 1), (None, 1), (1, 1)]
    y, x = inputs("q", rows)
    wanted = programs.reference("q", rows, y, x)
    bad = next(place for place in programs.slots[4].places if place.pool.module == "q")
    bad.pool.stacks[0][bad.row] = math.nan
    BatchEffects().build(programs.rows(rows))["q"].output(y, x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2, 3]], wanted[[0, 2, 3]])


@torch.inference_mode()
def test_pieces_act_in_their_order_whatever_the_order_of_a_program() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, scale, shift, x_scale = (torch.randn(n, generator=generator) for n in (4, 6, 6, 6, 4))
    pieces = (OutputShift(shift), OutputScale(scale), LowRank(a[None], b[None]), InputScale(x_scale))
    places = Pools(torch.float32, torch.device("cpu"), 1 << 20).place(tuple(("q", piece) for piece in pieces))
    _, x = inputs("q", [(None, 1), (0, 2)])
    effect = BatchEffects().build([(None, 1, 0), (Slot(places), 2, 0)])["q"]
    layer, before = nn.Linear(4, 6), x.clone()
    found = effect.linear(x[None], layer)
    assert torch.equal(x, before)
    wanted = torch.cat([layer(x[:1]), (layer(x[1:] * x_scale) + (x[1:] @ a)[:, None] * b) * scale + shift])
    torch.testing.assert_close(found, wanted[None])


@torch.inference_mode()
@pytest.mark.parametrize("kinds", ["sum", "sum and shift", "shift", "scaled input and sum", "of outputs"])
def test_a_layer_gives_its_product_and_all_pieces(kinds: str) -> None:
    """Whatever of them its product takes along."""
    generator = torch.Generator().manual_seed(0)
    a, b, left, shift, x_scale = (torch.randn(n, generator=generator) for n in (4, 6, 6, 6, 4))
    pieces = {
        "sum": (LowRank(a[None], b[None]),),
        "sum and shift": (LowRank(a[None], b[None]), OutputShift(shift)),
        "shift": (OutputShift(shift),),
        "scaled input and sum": (LowRank(a[None], b[None]), InputScale(x_scale)),
        "of outputs": (OutputLowRank(left[None], b[None]), LowRank(a[None], b[None])),
    }[kinds]
    places = Pools(torch.float32, torch.device("cpu"), 1 << 20).place(tuple(("q", piece) for piece in pieces))
    effect = BatchEffects().build([(Slot(places), 3, 0)])["q"]
    layer, x = nn.Linear(4, 6), torch.randn(1, 3, 4, generator=generator)
    wanted = layer(x * x_scale if "input" in kinds else x)
    if kinds == "of outputs":
        wanted = wanted + (wanted @ left)[..., None] * b
    if kinds != "shift":
        wanted = wanted + (x @ a)[..., None] * b
    if "shift" in kinds:
        wanted = wanted + shift
    torch.testing.assert_close(effect.linear(x, layer), wanted)


def test_a_soft_prompt_takes_the_first_positions_of_its_sequence_alone() -> None:
    soft = torch.arange(12.0).view(3, 4)
    places = Pools(torch.float32, torch.device("cpu"), 1 << 20).place((("q", SoftPrompt(soft)),))
    slot = Slot(places, soft_tokens=3)
    effects = BatchEffects()
    # A chunk inside, one across its end, one behind it; another sequence's beginning right after.
    parts = [(slot, 2, 0), (slot, 3, 1), (None, 1, 0), (slot, 2, 3), (slot, 1, 9), (slot, 4, 0)]
    y = torch.full((13, 4), -1.0)
    effects.build(parts)["q"].output(y, torch.zeros(13, dtype=torch.int64))
    kept = [-1.0] * 4
    wanted = [*soft[:2].tolist(), *soft[1:].tolist(), kept, kept, kept, kept, kept, *soft.tolist(), kept]
    assert y.tolist() == wanted


def test_decodes_behind_a_soft_prompt_repeat() -> None:
    places = Pools(torch.float32, torch.device("cpu"), 1 << 20).place((("q", SoftPrompt(torch.zeros(3, 4))),))
    slot, effects = Slot(places, soft_tokens=3), BatchEffects()
    first = effects.build([(slot, 1, 5)])
    assert effects.build([(slot, 1, 6)]) is first
    assert effects.build([(slot, 1, 2)]) is not first


@torch.inference_mode()
def test_pieces_at_one_module_act_in_the_order_of_their_stages() -> None:
    """Whatever their order in the program: y = bottleneck((head + low rank) * scale + shift)."""
    generator = torch.Generator().manual_seed(0)
    pieces = [
        ReluBottleneck(*(torch.randn(shape, generator=generator) for shape in ((3, 6), (3,), (3, 6), (6,)))),
        OutputShift(torch.randn(6, generator=generator)),
        OutputScale(torch.randn(6, generator=generator)),
        LowRank(torch.randn(2, 4, generator=generator), torch.randn(2, 6, generator=generator)),
        ReplacedHead(torch.randn(6, 4, generator=generator)),
        InputScale(torch.randn(4, generator=generator)),
    ]
    places = Pools(torch.float32, torch.device("cpu"), 10**6).place(tuple(("q", piece) for piece in pieces))
    effect = BatchEffects().build([(Slot(places), 2, 0)])["q"]
    x, layer = torch.randn(2, 4, generator=generator), nn.Linear(4, 6)
    bottleneck, shift, scale, low_rank, head, _ = (piece.tensors for piece in pieces)
    h = (x @ head[0].mT + x @ low_rank[0].mT @ low_rank[1]) * scale[0] + shift[0]
    wanted = h + (h @ bottleneck[0].mT + bottleneck[1]).relu() @ bottleneck[2] + bottleneck[3]
    torch.testing.assert_close(effect.linear(x, layer), wanted)
