"""Shared by the tests of what FlatQuant saves: its file of matrices for a tiny Llama, and what its formulas make of a layer, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# The transform of each linear layer's input.
TRANS = {"self_attn.q_proj": "self_attn.ln_trans", "self_attn.k_proj": "self_attn.ln_trans", "self_attn.v_proj": "self_attn.ln_trans",
         "mlp.gate_proj": "mlp.up_gate_trans", "mlp.up_proj": "mlp.up_gate_trans", "mlp.down_proj": "mlp.down_trans"}
LINEARS = [*TRANS, "self_attn.o_proj"]


def sizes(n: int) -> tuple[int, int]:
    """FlatQuant's rule: of a² − n = b² with the least a from √n on, a − b and a + b."""
    a = math.isqrt(n - 1) + 1
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    return a - b, a + b


def invertible(n: int, generator: torch.Generator) -> Tensor:
    """Neither orthogonal nor symmetric, of numbers that float16 holds; a transposed or inverted one is another."""
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (q * torch.linspace(0.6, 1.6, n) + 0.03 * torch.randn(n, n, generator=generator)).half().float()


def matrices(model: nn.Module, *, clips: bool = True, diag: bool = True, keys: bool = True, tied: bool = False, seed: int = 0) -> dict[int, dict]:
    """The content of flat_matrices.pth. clips: lwc and lac; tied: layers that share an input clip it in one way."""
    generator, config, blocks = torch.Generator().manual_seed(seed), model.config, {}
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for i in range(config.num_hidden_layers):
        block: dict[str, Tensor] = {}

        def put(name: str, matrix: Tensor, inverse: str) -> None:
            block[name], block[inverse] = matrix, torch.linalg.inv(matrix.double()).T.float()

        for trans, n in (("self_attn.ln_trans", config.hidden_size), ("mlp.up_gate_trans", config.hidden_size), ("mlp.down_trans", config.intermediate_size)):
            for side, size in zip(("left", "right"), sizes(n)):
                put(f"{trans}.matrix_{side}", invertible(size, generator), f"{trans}.matrix_{side}_inv")
            if diag:
                block[f"{trans}.diag_scale"] = torch.rand(n, generator=generator) + 0.5
        for trans, n in (("self_attn.o_trans", heads), ("self_attn.vcache_trans", head_dim), *((("self_attn.kcache_trans", head_dim),) if keys else ())):
            put(f"{trans}.matrix", invertible(n, generator), f"{trans}.matrix_inv_t")
        if clips:
            shared = {}
            for name in LINEARS:
                rows = model.get_submodule(f"model.layers.{i}.{name}").out_features
                for end in ("max", "min"):
                    block[f"{name}.clip_factor_w_{end}"] = 2.0 + torch.rand(rows, 1, generator=generator)
                    logit = 2.0 + torch.rand(1, generator=generator)
                    key = (TRANS.get(name, name), end)
                    block[f"{name}.act_quantizer.clip_factor_a_{end}"] = shared.setdefault(key, logit) if tied else logit
            for name in ("k", "v") if keys else ():
                for end in ("max", "min"):
                    block[f"self_attn.{name}_cache_quantizer.clip_factor_a_{end}"] = 3.0 + torch.rand(1, generator=generator)
        blocks[i] = block
    return blocks


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows x of numbers times left ⊗ right, by the whole matrix."""
    return x.double() @ torch.kron(left.double().contiguous(), right.double().contiguous())


def weight_of(model: nn.Module, block: dict[str, Tensor], index: int, name: str) -> Tensor:
    """The weight that FlatQuant rounds: transformed, clamped, then what is folded into its rows."""
    weight, trans = model.get_submodule(f"model.layers.{index}.{name}").weight.double(), TRANS.get(name)
    if trans is None:
        weight = kronecker(weight, block["self_attn.o_trans.matrix_inv_t"], block["self_attn.vcache_trans.matrix_inv_t"])
    else:
        scale = block.get(f"{trans}.diag_scale", torch.ones(weight.shape[1])).double()
        weight = kronecker(weight / scale, block[f"{trans}.matrix_left_inv"], block[f"{trans}.matrix_right_inv"])
    if f"{name}.clip_factor_w_max" in block:
        top, low = (block[f"{name}.clip_factor_w_{end}"].double().sigmoid() for end in ("max", "min"))
        weight = torch.minimum(torch.maximum(weight, weight.amin(1, keepdim=True) * low), weight.amax(1, keepdim=True) * top)
    if name == "self_attn.v_proj":
        matrix = block["self_attn.vcache_trans.matrix"].double()
        weight = (weight.T.unflatten(1, (-1, len(matrix))) @ matrix).flatten(1).T
    if name == "mlp.up_proj" and "mlp.down_trans.diag_scale" in block:
        weight = weight * block["mlp.down_trans.diag_scale"].double()[:, None]
    return weight


def rounded(weight: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, 1] by rounding to nearest, symmetric, one scale a row."""
    top = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True).clamp_min(1e-5) / top).float()
    return (weight / scale).round().clamp(-top - 1, top), scale


def input_of(block: dict[str, Tensor], name: str, x: Tensor, bits: int = 4) -> Tensor:
    """What a layer reads in the place of the float model's x [..., K]: transformed, and what its codes stand for."""
    trans = TRANS.get(name)
    if trans is None:  # the values that it adds up are transformed already, by what is folded into v_proj
        heads, values = block["self_attn.o_trans.matrix"], block["self_attn.vcache_trans.matrix"]
        y = kronecker(x, heads, values)
    else:
        y = kronecker(x * block.get(f"{trans}.diag_scale", torch.ones(x.shape[-1])), block[f"{trans}.matrix_left"], block[f"{trans}.matrix_right"])
    top, low = (block[key].double().sigmoid() if (key := f"{name}.act_quantizer.clip_factor_a_{end}") in block else 1.0 for end in ("max", "min"))
    most = torch.maximum(y.amax(-1, keepdim=True) * top, -y.amin(-1, keepdim=True) * low)
    scale = most / (2 ** (bits - 1) - 1)
    return (y / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def pack(codes: Tensor) -> Tensor:
    """Two codes of 4 bits to a byte, two's complement, the even column low."""
    nibbles = (codes.to(torch.int16) % 16).to(torch.uint8)
    return nibbles[:, 0::2] + 16 * nibbles[:, 1::2]


def saved_tensors(model: nn.Module, file: dict[int, dict], bits: int = 4) -> dict[str, Tensor]:
    """What FlatQuant's code saves of a model whose weights were rounded, by the names there."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        index, _, inside = layer.removeprefix("model.layers.").partition(".")
        if inside in LINEARS:
            block, key = file[int(index)], f"{layer}.linear"
            if name.endswith("bias"):
                bias = parameter.double()
                if inside == "self_attn.v_proj":
                    bias = (bias.unflatten(0, (-1, len(block["self_attn.vcache_trans.matrix"]))) @ block["self_attn.vcache_trans.matrix"].double()).flatten()
                if inside == "mlp.up_proj" and "mlp.down_trans.diag_scale" in block:
                    bias = bias * block["mlp.down_trans.diag_scale"]
                found[f"{key}.bias"] = bias.half()
                continue
            codes, scale = rounded(weight_of(model, block, int(index), inside), bits)
            found[f"{key}.weight"] = pack(codes)
            found |= {f"quantizer.{key}.scale": scale, f"quantizer.{key}.zero": torch.zeros_like(scale),
                      f"quantizer.{key}.maxq": torch.tensor(2 ** (bits - 1) - 1)}
            continue
        trans = {"input_layernorm": "self_attn.ln_trans", "post_attention_layernorm": "mlp.up_gate_trans"}.get(inside)
        scale = file[int(index)].get(f"{trans}.diag_scale", torch.ones(())) if trans else torch.ones(())
        found[name] = (parameter.double() * scale).half()
    found.update({f"model.layers.{i}.{name}": tensor.half() for i, block in file.items() for name, tensor in block.items()})
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}
