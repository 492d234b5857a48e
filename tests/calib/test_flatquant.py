"""FlatQuant's matrices: what its file says is done, the float output stays, codes and products are those of its formulas."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
from flatquant_files import LINEARS, input_of, matrices, rounded, sizes, weight_of  # noqa: E402
from helpers import sqnr  # noqa: E402
from language_models import build, ids  # noqa: E402

import vitq  # noqa: E402
from vitq.calib.blocks import quantize_blocks  # noqa: E402
from vitq.conversion import quantize  # noqa: E402
from vitq.models import prepare  # noqa: E402
from vitq.models.language import source_names  # noqa: E402
from vitq.quantizers import kronecker  # noqa: E402
from vitq.quantizers.activation import fake_activation  # noqa: E402

SIZES = dict(hidden_size=96, num_attention_heads=6, intermediate_size=160, num_key_value_heads=3)
SITES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
CALIB = [ids(2, 24, seed) for seed in range(4)]


def recipe(*changes: str) -> vitq.Recipe:
    return vitq.Recipe.from_yaml("flatquant-w4a4kv4").with_overrides(["calib_size=8", *changes])


@pytest.fixture(scope="module")
def model():
    return build("Llama", **SIZES)


@pytest.mark.parametrize("family, kwargs", [("Llama", {}), ("Qwen2", {}), ("Llama", {"num_key_value_heads": 6, "attention_bias": True})])
@pytest.mark.parametrize("diag", [True, False])
@torch.no_grad()
def test_the_float_output_stays(family: str, kwargs: dict, diag: bool) -> None:
    model, x = build(family, **{**SIZES, **kwargs}), ids(2, 20, seed=7)
    prepared = prepare(model)
    learned = vitq.import_flatquant(matrices(model, clips=False, diag=diag), model)
    plan, _ = quantize_blocks(prepared, recipe("transforms=[]"), None, stream="float", learned=learned)
    assert sqnr(model(x).logits, prepared.model(x).logits) > 100
    norm = prepared.model.model.layers[1].input_layernorm.weight
    scale = matrices(model, clips=False, diag=diag)[1].get("self_attn.ln_trans.diag_scale", 1.0)
    torch.testing.assert_close(norm, model.model.layers[1].input_layernorm.weight * scale)
    read: dict[str, torch.Tensor] = {}  # with the transforms, but nothing rounded, the layers' products stay too
    for layer in SITES:
        name = f"model.layers.1.{layer}"
        prepared.model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: read.update({name: args[0]}))
    prepared.model(x)
    for name, x in read.items():
        linear, transform = prepared.model.get_submodule(name), plan.layers[name].input.transform
        assert sqnr(x @ linear.weight.T, transform.apply(x) @ transform.inverse_transposed(linear.weight).T) > 55  # float16 numbers


@pytest.mark.parametrize("clips", [True, False])
@torch.no_grad()
def test_codes_and_products_are_those_of_its_formulas(model, clips: bool) -> None:
    file = matrices(model, clips=clips, tied=True)
    prepared, plan = quantize(model, recipe(), None, learned=vitq.import_flatquant(file, model))
    for i, block in file.items():
        for layer in SITES:
            params, wanted = plan.layers[f"model.layers.{i}.{layer}"], []
            sources = source_names(layer)
            wanted = [rounded(weight_of(model, block, i, source)) for source in sources]
            codes, scales = (torch.cat(parts) for parts in zip(*wanted))
            torch.testing.assert_close(params.weight_scale, scales[:, 0], rtol=1e-5, atol=0)
            assert float((params.codes != codes).float().mean()) < 1e-3, layer  # where a weight lies between two codes
            x = torch.randn(20, codes.shape[1], generator=torch.Generator().manual_seed(i)).half().float()
            ours = x  # as the model makes it now: scaled, values mixed
            trans = {"self_attn.qkv_proj": "self_attn.ln_trans", "mlp.gate_up_proj": "mlp.up_gate_trans", "mlp.down_proj": "mlp.down_trans"}.get(layer)
            if trans is not None:
                ours = x * block[f"{trans}.diag_scale"]
            else:
                matrix = block["self_attn.vcache_trans.matrix"]
                ours = (x.unflatten(1, (-1, len(matrix))) @ matrix).flatten(1)
            found = fake_activation(ours, params.input) @ (params.codes * params.weight_scale[:, None]).T
            exact = torch.cat([input_of(block, source, x) @ (q * s).T for source, (q, s) in zip(sources, wanted)], 1)
            assert sqnr(exact, found) > 30, layer  # a code that turns over in float16 weighs 20 dB less than the whole
    for site in prepared.caches:
        params, block = plan.layers[site.kv], file[int(site.name.split(".")[2])]
        assert torch.equal(params.k.transform.right.float(), block["self_attn.kcache_trans.matrix"]) and params.v.transform is None
        for name, fmt in (("k", params.k), ("v", params.v)):
            clip = [block[f"self_attn.{name}_cache_quantizer.clip_factor_a_{end}"].sigmoid() for end in ("min", "max")] if clips else [torch.ones(1)] * 2
            assert torch.equal(fmt.clip, torch.cat(clip))


@pytest.mark.parametrize("changes, calib", [((), None), (("solver=gptq",), CALIB), (("qk.other.bits=16", "pv.other.bits=16"), None)])
@torch.no_grad()
def test_it_runs_as_simulated_and_loads_again(model, changes: tuple, calib: list | None, tmp_path) -> None:
    made, x = recipe(*changes), ids(4, 24, seed=50)
    torch.save(matrices(model, tied=True), tmp_path / "flat_matrices.pth")
    learned = vitq.import_flatquant(tmp_path, model)
    simulated = vitq.simulate(model, made, calib, learned=learned)(x).logits
    executed = vitq.convert(model, made, calib, learned=learned, dtype=torch.float32)
    wanted = model(x).logits
    assert sqnr(simulated, executed(x).logits) > sqnr(wanted, simulated) + 8 and sqnr(wanted, simulated) > 2
    assert executed.vitq.recipe.transforms == () and executed.vitq.calibration == {"images": 0}
    again = vitq.load(vitq.save(executed, tmp_path / "saved"))
    assert torch.equal(again(x).logits, executed(x).logits)
    if not changes:
        random = vitq.import_flatquant(matrices(model, seed=1), model)
        assert not torch.equal(vitq.simulate(model, made, learned=random)(x).logits, simulated), "it is the file that decides"


@torch.no_grad()
def test_both_streams_and_a_run_that_goes_on(model, tmp_path) -> None:
    learned, made, x = vitq.import_flatquant(matrices(model, tied=True), model), recipe("solver=gptq"), ids(2, 20, seed=3)
    for stream in ("float", "quantized"):
        def run(of: dict = learned, stream: str = stream, **kwargs) -> torch.Tensor:
            return vitq.convert(model, made, CALIB, learned=of, stream=stream, dtype=torch.float32, **kwargs)(x).logits

        whole, folder = run(), tmp_path / stream
        assert torch.equal(run(resume=folder), whole)
        sorted(folder.glob("0*.safetensors"))[-1].unlink()
        assert torch.equal(run(resume=folder), whole)
        with pytest.raises(ValueError, match="holds a run of other matrices"):
            run(resume=folder, of=vitq.import_flatquant(matrices(model, seed=1), model))
    assert torch.equal(vitq.convert(model, recipe(), learned=learned, stream="quantized", dtype=torch.float32)(x).logits,
                       vitq.convert(model, recipe(), learned=learned, dtype=torch.float32)(x).logits), "rounding to nearest looks at no data"


def test_clips_of_one_input_become_their_mean(model, caplog) -> None:
    file = matrices(model)
    with caplog.at_level(logging.WARNING, "vitq"):
        learned = vitq.import_flatquant(file, model)
    assert "differ by up to 0.0" in caplog.text and "here they share the mean" in caplog.text
    clips = [torch.cat([file[1][f"self_attn.{n}_proj.act_quantizer.clip_factor_a_{end}"] for end in ("min", "max")]).sigmoid() for n in "qkv"]
    torch.testing.assert_close(learned["model.layers.1.self_attn.qkv_proj"].clip, sum(clips) / 3)
    caplog.clear()
    vitq.import_flatquant(matrices(model, tied=True), model)
    assert not caplog.text


@pytest.mark.parametrize("features", [768, 896, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120, 8192, 8960, 11008, 13824, 14336, 18944, 28672])
def test_its_rule_for_sizes_is_ours_where_models_are(features: int) -> None:
    assert sizes(features) == kronecker.sizes(features)


def test_files_that_do_not_fit(model, tmp_path) -> None:
    file = matrices(model)

    def refuses(match: str, change, of=model) -> None:
        blocks = {i: dict(block) for i, block in file.items()}
        change(blocks)
        with pytest.raises(ValueError, match=match):
            vitq.import_flatquant(blocks, of)

    left = "self_attn.ln_trans.matrix_left"
    refuses("block 1: 'self_attn.ln_trans.matrix_left' is missing", lambda blocks: blocks[1].pop(left))
    refuses("'mlp.up_proj.clip_factor_w_max' is missing", lambda blocks: blocks[0].pop("mlp.up_proj.clip_factor_w_max"))
    refuses("'self_attn.k_proj.act_quantizer.clip_factor_a_min' is missing",
            lambda blocks: blocks[0].pop("self_attn.k_proj.act_quantizer.clip_factor_a_min"))
    refuses("mlp.other_trans.matrix are not known", lambda blocks: blocks[0].update({"mlp.other_trans.matrix": torch.eye(2)}))
    refuses("is not the transpose of the inverse", lambda blocks: blocks[0].update({left: file[0][left].T.contiguous()}))
    refuses("is no tensor of finite floats", lambda blocks: blocks[0].update({left: file[0][left] * float("nan")}))
    refuses("holds zeros", lambda blocks: blocks[0].update({"mlp.down_trans.diag_scale": torch.zeros(160)}))
    refuses(r"is \[80\], the model needs \[160\]", lambda blocks: blocks[0].update({"mlp.down_trans.diag_scale": torch.ones(80)}))
    refuses("queries are quantized", lambda blocks: blocks[0].update({"self_attn.q_cache_quantizer.clip_factor_a_max": torch.ones(1)}))
    refuses("has blocks .*, this LlamaForCausalLM has 0 to 1", lambda blocks: blocks.pop(1))
    refuses(r"clip_factor_w_min' is \[96, 1\], the model needs \[64, 1\]", lambda blocks: None, build("Llama"))
    refuses("FlatQuant's files are of Llama", lambda blocks: None, build("OPT"))
    with pytest.raises(ValueError, match="not a mapping of block numbers"):
        vitq.import_flatquant({0: torch.eye(2)}, model)
    with pytest.raises(FileNotFoundError, match="flat_matrices.pth: no such file"):
        vitq.import_flatquant(tmp_path, model)
    odd = build("Llama", hidden_size=72, num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.qkv_proj' are 6 x 6 and 12 x 12, and vitq divides its rows by 8 x 8 and 9 x 9"):
        vitq.convert(odd, recipe(), learned=vitq.import_flatquant(matrices(odd), odd))


def test_recipes_that_do_not_fit(model) -> None:
    learned = vitq.import_flatquant(matrices(model), model)
    qkv = "model.layers.0.self_attn.qkv_proj"
    for made, given, match in (
            (vitq.Recipe.from_yaml("quarot-w4a4kv4"), learned, "learns nothing: learned= is for one with block_gradient"),
            (recipe("input.transform=hadamard"), learned, "'model.layers.0.self_attn.qkv_proj' has its own transform, and recipe .* give transform: learned"),
            (recipe("input.observer=minmax"), learned, "give observer: learned"),
            (recipe("pv.other.observer=minmax"), learned, "'model.layers.0.self_attn.pv' has its own observer"),
            (recipe(), {name: params for name, params in learned.items() if name != qkv}, f"nothing is there of '{qkv}'"),
            (recipe(), vitq.import_flatquant(matrices(model, keys=False), model), "nothing is there of 'model.layers.0.self_attn.qk'"),
            (recipe(), {**learned, "model.layers.7.mlp.down_proj": learned[qkv]}, "model.layers.7.mlp.down_proj are no layers"),
            (recipe(), {**learned, qkv: learned["model.layers.0.mlp.down_proj"]}, "10 x 10 and 16 x 16, and vitq divides its rows by 8 x 8 and 12 x 12"),
            (recipe("solver=gptq"), learned, "solves by 'gptq': give calib=")):
        with pytest.raises(ValueError, match=match):
            vitq.convert(model, made, learned=given)
    found = vitq.convert(model, recipe("qk.other.bits=16", "pv.other.bits=16", "proj.bits=16"), learned=learned, dtype=torch.float32)
    assert type(found.model.layers[0].self_attn.o_proj) is torch.nn.Linear, "what the recipe leaves in float needs nothing of the file"
    assert len(LINEARS) == 7 and not any(name.endswith("lm_head") for name in learned)
