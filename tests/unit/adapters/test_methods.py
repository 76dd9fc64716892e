"""What each method's pieces do, held against PEFT's own layers in float64; and what each refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hatrack_server.adapters import methods
from hatrack_server.adapters.methods.lokr import factorized
from hatrack_server.adapters.pieces import Kronecker, LowRank, OutputScale, Piece, Pieces, Stage
from hatrack_server.adapters.pools import Pool, Pools
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.kernels.runs import Run
from hatrack_server.types import AttentionShape, BaseShapes, LinearShape

SHAPES = {"attn.q_proj": LinearShape(24, 36), "attn.k_proj": LinearShape(12, 36), "mlp.down_proj": LinearShape(36, 20)}
BASE = BaseShapes(SHAPES, "embed_tokens", 36, (AttentionShape("attn", 2, 6, 6), AttentionShape("attn2", 2, 6, 6)))
ADALORA = {"init_r": 6, "target_r": 2, "total_step": 10}
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=["k_proj"]),
    "lora with biases": peft.LoraConfig(r=3, lora_alpha=8, lora_bias=True, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=3, lora_alpha=8, use_dora=True, target_modules="all-linear"),
    "dora, rank-stabilised": peft.LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 1.5}),
    "lokr": peft.LoKrConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"]),
    "lokr, whole": peft.LoKrConfig(r=64, target_modules=["q_proj", "down_proj"]),
    "lokr, both decomposed": peft.LoKrConfig(r=1, decompose_both=True, target_modules=["q_proj", "down_proj"]),
    "lokr by 4": peft.LoKrConfig(r=2, decompose_factor=4, rank_pattern={"q_proj": 1}, target_modules="all-linear"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3, all outputs": peft.IA3Config(target_modules=".*_proj", feedforward_modules=[]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], lora_alpha=4, **ADALORA),
    "adalora, alpha 0": peft.AdaLoraConfig(target_modules=["q_proj"], lora_alpha=0, **ADALORA),
    "adalora, pruned": peft.AdaLoraConfig(
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"attn.q_proj.lora_E": [True, False, True, True, False, False], "attn.k_proj.lora_E": [False] * 6},
        **ADALORA,
    ),
    "vera": peft.VeraConfig(r=5, target_modules=["q_proj", "down_proj"]),
    "vera, from its seed": peft.VeraConfig(r=5, projection_prng_key=7, target_modules=".*_proj"),
    "miss": peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "miss, r no divisor": peft.MissConfig(r=7, target_modules=["q_proj"]),
    "delora": peft.DeloraConfig(r=3, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}),
    "gralora": peft.GraloraConfig(r=6, alpha=8, target_modules=["q_proj", "k_proj"]),
    "gralora, hybrid": peft.GraloraConfig(r=4, hybrid_r=3, gralora_k=4, target_modules="all-linear"),
    "hra": peft.HRAConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"]),
    "hra, more than in_features": peft.HRAConfig(r=23, target_modules=["down_proj"]),
    "hra, made orthogonal": peft.HRAConfig(r=3, apply_GS=True, target_modules=["q_proj", "down_proj"]),
    "deft": peft.DeftConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "deft by qr": peft.DeftConfig(r=13, alpha=4, decomposition_method="qr", target_modules=["q_proj", "k_proj"]),
    "deft, alpha 0": peft.DeftConfig(r=3, alpha=0, target_modules=["q_proj"]),
    "para": peft.DeftConfig(r=3, para=True, target_modules=["k_proj", "down_proj"]),
    "vblora": peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=12, target_modules=["q_proj", "k_proj"]),
    "vblora, the whole bank": peft.VBLoRAConfig(
        r=5, num_vectors=6, vector_length=4, topk=6, target_modules="all-linear"
    ),
    "unilora": peft.UniLoraConfig(r=3, theta_d_length=50, target_modules="all-linear"),
    "unilora, more than needed": peft.UniLoraConfig(
        r=2, theta_d_length=999, proj_seed=0, target_modules=["q_proj", "down_proj"]
    ),
    "tinylora": peft.TinyLoraConfig(r=3, u=5, target_modules=["q_proj", "down_proj"]),
    "tinylora, tied": peft.TinyLoraConfig(r=2, weight_tying=0.5, target_modules="all-linear"),
    "tinylora, from its seed": peft.TinyLoraConfig(
        r=13, u=4, weight_tying=1, projection_seed=7, target_modules=".*_proj"
    ),
}
for name in ("vera", "tinylora"):
    CONFIGS[f"{name}, from its seed"].save_projection = False  # PEFT would warn, and is right


HRA, HRA_U = {"peft_type": "HRA", "r": 4, "target_modules": ["q_proj"]}, "base_model.model.attn.q_proj.hra_u"


class Net(nn.Module):
    """Three linear layers of a base, each on inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.ModuleDict({
            "q_proj": nn.Linear(36, 24, bias=True), "k_proj": nn.Linear(36, 12, bias=False),
        })  # fmt: skip
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(20, 36, bias=True)})

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.get_submodule(name)(x) for name, x in inputs.items()}


class Layers:
    """A base's linear layers in float64."""

    shapes = BASE

    def __init__(self, net: Net) -> None:
        self._net = net

    def project(self, layer: str, rows: Tensor) -> Tensor:
        return rows @ self._weight(layer).mT

    def squared_norms(self, layer: str) -> Tensor:
        return self._weight(layer).square().sum(1)

    def end(self, module: str, parameter: str) -> Tensor:
        return self._net.get_submodule(module).get_parameter(parameter).detach()

    def norm_offset(self, norm: str) -> float:
        raise KeyError(norm)

    def bias(self, layer: str) -> Tensor | None:
        bias = self._net.get_submodule(layer).bias
        return None if bias is None else bias.detach()

    def _weight(self, layer: str) -> Tensor:
        weight: Tensor = self._net.get_submodule(layer).weight
        return weight.detach()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(7, shape.in_features, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def saved(config: peft.PeftConfig, path: Path) -> tuple[peft.PeftModel, dict[str, Any]]:
    """PEFT's model with random weights, loaded from what PEFT saved; and the saved configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net().double(), config, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if model.prefix in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        model.double().save_pretrained(path)
        loaded = peft.PeftModel.from_pretrained(Net().double(), path, autocast_adapter_dtype=False).double()
    for name, value in load_file(path / "adapter_model.safetensors").items():
        assert value.dtype is torch.float64, name
    return loaded.eval(), json.loads((path / "adapter_config.json").read_text())


def headers_of(path: Path) -> dict[str, TensorHeader]:
    """As the gate reads them, which takes no float64."""
    tensors = load_file(path / "adapter_model.safetensors")
    return {name: TensorHeader("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}


def placed(piece: Piece) -> tuple[Any, ...]:
    """What a pool of one row in float64 holds of the piece."""
    pool = Pool(0, "any", piece, torch.float64, torch.device("cpu"), lazy=False)
    pool.grow(1)
    pool.write(pool.take(), piece)
    return pool.stacks


def applied(pieces: Pieces, layer: str, x: Tensor, net: Net) -> Tensor:
    """The layer's output for tokens that all have these pieces."""
    run = [Run(0, len(x), (0,))]
    mine = sorted((piece for where, piece in pieces if where == layer), key=lambda piece: piece.stage)
    seen = x.clone()
    for piece in mine:
        if piece.stage is Stage.INPUT:
            piece.bind(placed(piece), run)(seen, x)
    y = net.get_submodule(layer)(seen)
    for piece in mine:
        if piece.stage is not Stage.INPUT:
            piece.bind(placed(piece), run)(y, x)
    return y


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_pieces_do_what_peft_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = saved(CONFIGS[name], tmp_path)
    headers = headers_of(tmp_path)
    spec = methods.describe(config, headers, BASE, max_rank=64)
    assert spec.tensors == {key: header.shape for key, header in headers.items()}
    net = Net().double()
    pieces = methods.compile(config, load_file(tmp_path / "adapter_model.safetensors"), Layers(net))
    kinds = [(layer, type(piece)) for layer, piece in pieces]
    assert len(set(kinds)) == len(kinds)
    assert {layer for layer, _ in kinds} <= SHAPES.keys()
    given = inputs()
    base = net(given)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)  # to which DEFT turns whatever it is given
        wanted = model(given)
    changed = 0
    for layer, x in given.items():
        torch.testing.assert_close(applied(pieces, layer, x, net), wanted[layer], rtol=0, atol=1e-12)
        changed += not torch.equal(wanted[layer], base[layer])
    assert changed == len({layer for layer, _ in kinds})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_needed_and_no_other_taken(name: str, tmp_path: Path) -> None:
    _, config = saved(CONFIGS[name], tmp_path)
    headers = headers_of(tmp_path)
    for key, header in headers.items():
        without = {other: value for other, value in headers.items() if other != key}
        longer = headers | {key: TensorHeader("F64", (*header.shape[:-1], header.shape[-1] + 1))}
        for wrong in (without, longer):
            with pytest.raises(InvalidArtifact) as refused:
                methods.describe(config, wrong, BASE, max_rank=64)
            assert refused.value.field.startswith(("adapter_model.safetensors: base_model.", "adapter_config.json"))
    more = headers | {"base_model.model.attn.k_proj.other": TensorHeader("F64", (3,))}
    with pytest.raises(InvalidArtifact, match="asks for no such tensor"):
        methods.describe(config, more, BASE, max_rank=64)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_of_this_peft_is_known_or_off_by_default(name: str) -> None:
    config = CONFIGS[name].to_dict()
    config["peft_type"] = config["peft_type"].value
    with pytest.raises(InvalidArtifact) as refused:
        methods.describe(config | {"an_option_of_a_later_peft": "on"}, {}, BASE, max_rank=64)
    assert refused.value.field == "adapter_config.json: an_option_of_a_later_peft"


WRONG: dict[str, list[tuple[str, Any]]] = {
    "loha": [("r", 0), ("r", "3"), ("alpha", None), ("alpha", 1e40), ("rank_pattern", [1]), ("modules_to_save", ["x"])],
    "lokr": [("r", True), ("alpha", "1"), ("decompose_factor", 0), ("decompose_factor", "x"), ("decompose_both", 1)],
    "ia3": [("feedforward_modules", None), ("feedforward_modules", [1]), ("modules_to_save", ["lm_head"])],
    "adalora": [("init_r", 0), ("init_r", 1), ("use_dora", True), ("lora_bias", True), ("alpha_pattern", {"x": 1}),
                ("bias", "all"), ("init_lora_weights", "pissa"), ("lora_alpha", "4")],
    "vera": [("r", 0), ("bias", "vera_only"), ("projection_prng_key", -1), ("projection_prng_key", "0")],
    "miss": [("r", 0), ("bias", "all"), ("init_weights", "bat"), ("init_weights", "mini")],
    "delora": [("r", 0), ("rank_pattern", [1]), ("bias", "delora_only")],
    "gralora": [("r", 0), ("alpha", "8"), ("hybrid_r", -1), ("hybrid_r", True), ("gralora_k", 0),
                ("gralora_k", 4), ("gralora_k", "2"), ("bias", "all")],
    "hra": [("r", 0), ("apply_GS", "yes"), ("bias", "hra_only")],
    "deft": [("r", 0), ("alpha", "4"), ("alpha", 1e40), ("decomposition_method", "svd"), ("decomposition_method", None),
             ("para", 1), ("bias", "deft_only")],
    "vblora": [("r", 0), ("num_vectors", 0), ("vector_length", 5), ("vector_length", None), ("topk", 0), ("topk", 8),
               ("save_only_topk_weights", True), ("bias", "vblora_only")],
    "unilora": [("r", 0), ("theta_d_length", 0), ("proj_seed", None), ("proj_seed", -1), ("save_indices", True),
                ("exclude_modules", ["x"]), ("bias", "unilora_only")],
    "tinylora": [("r", 0), ("u", 0), ("weight_tying", 1.5), ("weight_tying", True), ("projection_seed", 0.5),
                 ("projection_seed", 2**63), ("save_projection", 1), ("exclude_modules", "x"), ("bias", "all")],
    "dora": [("use_dora", "yes"), ("lora_bias", 1), ("use_qalora", True), ("bias", "lora_only")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), [(n, k, v) for n, wrong in WRONG.items() for k, v in wrong])
def test_what_is_wrong_is_refused_by_its_key(name: str, key: str, value: Any, tmp_path: Path) -> None:
    _, config = saved(CONFIGS[name], tmp_path)
    with pytest.raises(InvalidArtifact) as refused:
        methods.describe(config | {key: value}, headers_of(tmp_path), BASE, max_rank=64)
    assert refused.value.field == f"adapter_config.json: {key}"


def test_loha_counts_its_squared_rank(tmp_path: Path) -> None:
    _, config = saved(CONFIGS["loha"], tmp_path)
    headers = headers_of(tmp_path)
    assert methods.describe(config, headers, BASE, max_rank=9).rank == 9
    with pytest.raises(InvalidArtifact, match="rank 9"):
        methods.describe(config, headers, BASE, max_rank=8)


def test_gralora_counts_the_rank_of_all_its_blocks(tmp_path: Path) -> None:
    _, config = saved(CONFIGS["gralora, hybrid"], tmp_path)
    assert methods.describe(config, headers_of(tmp_path), BASE, max_rank=64).rank == 4 * 4 + 3
    with pytest.raises(InvalidArtifact, match="8 equal blocks"):
        methods.describe(config | {"r": 8, "gralora_k": 8}, headers_of(tmp_path), BASE, max_rank=128)


def test_delora_weighs_inputs_as_its_file_says(tmp_path: Path) -> None:
    _, config = saved(CONFIGS["delora"], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    before = dict(methods.compile(config, tensors, Layers(Net().double())))
    weights = {key: 2 * tensor for key, tensor in tensors.items() if key.endswith("w_norm")}
    after = dict(methods.compile(config, tensors | weights, Layers(Net().double())))
    for layer, piece in before.items():
        assert torch.equal(after[layer].tensors[0], 2 * piece.tensors[0])
        assert torch.equal(after[layer].tensors[1], piece.tensors[1])


def test_a_delora_direction_of_no_length_adds_nothing(tmp_path: Path) -> None:
    _, config = saved(CONFIGS["delora"], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("delora_A"):
            tensor[0] = 0
    for _, piece in methods.compile(config, tensors, Layers(Net().double())):
        a, b = piece.tensors
        assert a.isfinite().all()
        assert b.isfinite().all()
        assert not a[0].any()


def test_reflections_that_cancel_change_nothing() -> None:
    """As HRA begins: each vector twice."""
    u = torch.randn(36, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    [(_, piece)] = methods.compile(HRA, {HRA_U: u}, Layers(Net()))
    a, b = piece.tensors
    assert (b.mT @ a).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("apply_gs", "change", "message"),
    [
        (False, lambda u: u.index_fill(1, torch.tensor([1]), 0), "a column is 0"),
        (True, lambda u: u.index_fill(1, torch.tensor([1]), 0), "a column is 0"),
        (True, lambda u: u.repeat_interleave(2, dim=1), "depend on each other"),
        (True, lambda u: u.repeat(1, 10), "depend on each other"),
    ],
)
def test_reflections_that_the_numbers_leave_open_are_refused(apply_gs: bool, change: Any, message: str) -> None:
    u = torch.randn(36, 4, generator=torch.Generator().manual_seed(0))
    config = HRA | {"apply_GS": apply_gs}
    assert len(methods.compile(config, {HRA_U: u}, Layers(Net()))) == 1
    with pytest.raises(InvalidArtifact, match=message) as refused:
        methods.compile(config, {HRA_U: change(u)}, Layers(Net()))
    assert refused.value.field == f"adapter_model.safetensors: {HRA_U}"


@pytest.mark.parametrize(
    ("name", "key", "value", "field"),
    [("tinylora, from its seed", "u", 1 << 20, "save_projection"), ("unilora", "r", 1 << 19, "r")],
)
def test_a_small_file_draws_no_more_than_a_load_may_take(
    name: str, key: str, value: int, field: str, tmp_path: Path
) -> None:
    _, config = saved(CONFIGS[name], tmp_path)
    with pytest.raises(InvalidArtifact, match="drawn at each load") as refused:
        methods.describe(config | {key: value}, headers_of(tmp_path), BASE, max_rank=1 << 20)
    assert refused.value.field == f"adapter_config.json: {field}"


def test_a_module_pruned_to_nothing_has_no_piece(tmp_path: Path) -> None:
    _, config = saved(CONFIGS["adalora, pruned"], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    [(layer, piece)] = methods.compile(config, tensors, Layers(Net().double()))
    assert layer == "attn.q_proj"
    assert isinstance(piece, LowRank)
    assert piece.rank == 3


@pytest.mark.parametrize("dimension", [1, 12, 36, 127, 128, 250, 256, 2048, 5632])
@pytest.mark.parametrize("divisor", [-1, 1, 4, 8, 10, 16])
def test_dimensions_are_split_as_peft_splits_them(dimension: int, divisor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert factorized(dimension, divisor) == factorization(dimension, divisor)


@pytest.mark.parametrize(
    ("config", "size", "parameters"),
    [
        (peft.LoraConfig(r=8, target_modules=["w"]), 256, 2 * 256 * 8),
        (peft.LoHaConfig(r=8, target_modules=["w"]), 256, 4 * 256 * 8),
        (peft.LoKrConfig(r=4, target_modules=["w"]), 256, 384),
        (peft.LoKrConfig(r=8, target_modules=["w"]), 4096, 5120),
    ],
    ids=["lora", "loha", "lokr 256", "lokr 4096"],
)
def test_parameter_counts_of_the_papers(config: peft.PeftConfig, size: int, parameters: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = peft.get_peft_model(nn.ModuleDict({"w": nn.Linear(size, size, bias=False)}), config)
    headers = {
        f"base_model.model.{name.removeprefix('base_model.model.')}".replace(".default", ""): TensorHeader(
            "F32", tuple(parameter.shape)
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    saved_config = config.to_dict() | {"peft_type": config.peft_type.value, "target_modules": ["w"]}
    base = BaseShapes({"w": LinearShape(size, size)}, "e", 1, ())
    assert methods.describe(saved_config, headers, base, max_rank=64).parameters == parameters


def test_what_a_program_takes_in_memory_is_told_beforehand(tmp_path: Path) -> None:
    for number, config in enumerate(CONFIGS.values()):
        _, read = saved(config, tmp_path / str(number))
        path = tmp_path / str(number) / "adapter_model.safetensors"
        spec = methods.describe(read, headers_of(path.parent), BASE, max_rank=64)
        pieces = methods.compile(read, load_file(path), Layers(Net().double()))
        taken = Pools(torch.bfloat16, torch.device("cpu"), 1 << 30).size(pieces)
        assert spec.resident_bytes == pytest.approx(taken, rel=0.15), config.peft_type


def test_kinds_of_pieces() -> None:
    assert LowRank(torch.zeros(3, 4), torch.zeros(3, 5)).shapes == ((4, 4), (4, 5))
    assert Kronecker(torch.zeros(3, 4), torch.zeros(3, 5)).shapes == ((3, 4), (3, 5))
    assert OutputScale(torch.zeros(3)).shapes == ((3,),)


SOFT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}
GATED = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 1, "target_modules": "attn"}
ATTENTION = {f"attn2.{name}": LinearShape(12, 36) for name in ("k_proj", "v_proj")} | {
    "attn2.q_proj": LinearShape(24, 36),
    "attn2.o_proj": LinearShape(36, 24),
}
LLAMA = BaseShapes(SHAPES | ATTENTION, "embed_tokens", 36, (AttentionShape("attn2", 2, 6, 6),))


def soft_headers(*shape: int) -> dict[str, TensorHeader]:
    return {"prompt_embeddings": TensorHeader("F32", shape)}


def gated_headers(length: int = 4) -> dict[str, TensorHeader]:
    prefix = "base_model.model.attn2.adaption_"
    return {f"{prefix}prompt": TensorHeader("F32", (1, length, 36)), f"{prefix}gate": TensorHeader("F32", (1,))}


def test_virtual_tokens_are_counted() -> None:
    spec = methods.describe(SOFT, soft_headers(5, 36), BASE, max_rank=1)
    assert (spec.soft_tokens, spec.prefix_tokens, spec.parameters, spec.resident_bytes) == (5, 0, 180, 360)
    spec = methods.describe(SOFT | {"peft_type": "P_TUNING"}, soft_headers(5, 36), BASE, max_rank=1)
    assert (spec.method, spec.soft_tokens) == ("P_TUNING", 5)
    spec = methods.describe(SOFT | {"peft_type": "PREFIX_TUNING"}, soft_headers(5, 48), BASE, max_rank=1)
    assert (spec.soft_tokens, spec.prefix_tokens) == (0, 5)


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_virtual_tokens", 0),
        ("num_virtual_tokens", None),
        ("num_virtual_tokens", "5"),
        ("num_transformer_submodules", 2),
        ("modules_to_save", ["lm_head"]),
        ("an_option_of_a_later_peft", 1),
    ],
)
def test_what_is_wrong_with_a_prompt_is_refused(peft_type: str, key: str, value: Any) -> None:
    width = 48 if peft_type == "PREFIX_TUNING" else 36
    config = SOFT | {"peft_type": peft_type}
    assert methods.describe(config, soft_headers(5, width), BASE, max_rank=1)
    with pytest.raises(InvalidArtifact) as refused:
        methods.describe(config | {key: value}, soft_headers(5, width), BASE, max_rank=1)
    assert refused.value.field == f"adapter_config.json: {key}"
    for headers in ({}, soft_headers(4, width), soft_headers(5, width + 1), {"other": TensorHeader("F32", (5, width))}):
        with pytest.raises(InvalidArtifact) as refused:
            methods.describe(config, headers, BASE, max_rank=1)
        assert refused.value.field.startswith("adapter_model.safetensors: ")


def test_a_prefix_needs_attention_layers_that_are_alike() -> None:
    other = BaseShapes({}, "e", 36, (AttentionShape("a", 2, 6, 6), AttentionShape("b", 1, 6, 6)))
    for base in (other, BaseShapes({}, "e", 36, ()), BaseShapes({}, "e", 36, (AttentionShape("a", 2, 6, 4),))):
        with pytest.raises(InvalidArtifact, match="alike"):
            methods.describe(SOFT | {"peft_type": "PREFIX_TUNING"}, soft_headers(5, 48), base, max_rank=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("adapter_len", 0), ("adapter_layers", 3), ("adapter_layers", "1"), ("target_modules", "mlp"), ("other", 1)],
)
def test_what_is_wrong_with_an_adaption_prompt_is_refused(key: str, value: Any) -> None:
    assert methods.describe(GATED | {"target_modules": "attn2"}, gated_headers(), LLAMA, max_rank=1).parameters == 145
    with pytest.raises(InvalidArtifact) as refused:
        methods.describe(GATED | {"target_modules": "attn2", key: value}, gated_headers(), LLAMA, max_rank=1)
    assert refused.value.field == f"adapter_config.json: {key}"


def test_an_adaption_prompt_needs_attention_that_it_knows() -> None:
    with pytest.raises(InvalidArtifact, match="k_proj, v_proj and o_proj"):
        methods.describe(GATED | {"target_modules": "attn2"}, gated_headers(), BASE, max_rank=1)
    with pytest.raises(InvalidArtifact, match="this base needs"):
        methods.describe(GATED | {"target_modules": "attn2"}, gated_headers(5), LLAMA, max_rank=1)


@pytest.mark.parametrize(
    ("layers", "hidden", "feed_forward", "kv", "targets", "rank", "parameters"),
    [
        (32, 4096, 11008, 4096, "all-linear", 64, 159_907_840),
        (40, 5120, 13824, 5120, "all-linear", 64, 250_347_520),
        (80, 8192, 22016, 8192, "all-linear", 64, 799_539_200),
        (32, 4096, 14336, 1024, "all-linear", 16, 41_943_040),
        (96, 12288, 49152, 12288, ["q_proj", "v_proj"], 8, 37_748_736),
    ],
    ids=["LLaMA-7B", "LLaMA-13B", "LLaMA-65B", "Llama-3-8B", "GPT-3"],
)
def test_parameter_counts_of_real_bases(
    layers: int, hidden: int, feed_forward: int, kv: int, targets: str | list[str], rank: int, parameters: int
) -> None:
    widths = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "gate_proj": feed_forward, "up_proj": feed_forward}
    shapes = {name: LinearShape(width, hidden) for name, width in widths.items()}
    shapes |= {"o_proj": LinearShape(hidden, hidden), "down_proj": LinearShape(hidden, feed_forward)}
    linears = {f"layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}
    headers = {}
    for module, shape in linears.items():
        if targets == "all-linear" or module.rpartition(".")[2] in targets:
            headers[f"base_model.model.{module}.lora_A.weight"] = TensorHeader("F32", (rank, shape.in_features))
            headers[f"base_model.model.{module}.lora_B.weight"] = TensorHeader("F32", (shape.out_features, rank))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": targets}
    spec = methods.describe(config, headers, BaseShapes(linears, "e", hidden, ()), max_rank=64)
    assert spec.parameters == parameters
    assert spec.resident_bytes == 2 * parameters


@pytest.mark.parametrize("peft_type", methods.REFUSED)
def test_a_method_that_can_share_no_batch_is_refused_with_the_reason(peft_type: str) -> None:
    assert peft_type in {*peft.PeftType, "PARTIAL"}  # that is Hatrack's own
    assert peft_type not in methods.methods()
    with pytest.raises(InvalidArtifact, match=methods.REFUSED[peft_type]) as caught:
        methods.describe({"peft_type": peft_type}, {}, BASE, max_rank=64)
    assert caught.value.field == "adapter_config.json: peft_type"
