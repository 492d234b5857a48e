"""FlatQuant's matrices (Sun et al., ICML 2025, arXiv 2410.09426; `flat_matrices.pth` of its code), as what `block_gradient` would have learned.

The file is {number of a block: {name in the block: tensor}}. In that code a row x of an input becomes (x · diag)·(left ⊗ right), a weight's row
(w / diag) times the inverse transpose of the same, which is in the file as `matrix_left_inv` and `matrix_right_inv`; `o_trans` mixes the heads of
an attention's result, `vcache_trans` the numbers of each head's values, `kcache_trans` those of its keys behind the rotary positions. Clips are logits,
whose sigmoid is the part that is kept of a range's end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitq.calib.pickled import read_pickled
from vitq.formats import Kronecker
from vitq.models import prepare
from vitq.models.language import source_names
from vitq.plan import InputParams

FILE = "flat_matrices.pth"
INVERSE_ERROR = 0.02  # how far a matrix times what the file calls its inverse may be from the identity
SPREAD = 0.05  # of the clips of layers that share an input, from which on a warning tells of it
INPUTS = {"self_attn.qkv_proj": "self_attn.ln_trans", "self_attn.o_proj": "self_attn.o_trans", "mlp.gate_up_proj": "mlp.up_gate_trans",
          "mlp.down_proj": "mlp.down_trans"}  # the transform of each input, by the layer that reads it

log = logging.getLogger("vitq")


def import_flatquant(matrices: str | os.PathLike | Mapping[int, Mapping[str, Tensor]], model: nn.Module) -> dict[str, InputParams]:
    """What `convert` and `simulate` take as `learned=`, of what FlatQuant saved of `model` (`main.py --save_matrix`), so that nothing is learned again.

    matrices: `flat_matrices.pth`, the folder that holds it, or its content. It is read without running any code in it. model: the float model, a
        Llama, Mistral, Qwen2 or Qwen3 of transformers. The file does not say how many bits there were: the recipe does.
    Returns an entry for each input, by the name of the layer that reads it, and for the keys and the values of each attention, by `NAME.qk` and `NAME.pv`.

    q, k and v, and gate and up, have clips of their own in FlatQuant, and read one quantized input here: its clip is their mean, and a warning says how
    far they are apart. What is beyond a weight's clip is set to it, as FlatQuant does. Matrices become float16, which is what multiplies in both.

    Raises FileNotFoundError; ValueError for a file that is none, tensors that are missing, unknown, not finite or of a shape that does not fit the
    model, matrices that are not the inverses that the file says they are, and quantized queries, which vitq leaves in float.
    """
    where = "the given matrices"
    if not isinstance(matrices, Mapping):
        path = Path(matrices) / FILE if Path(matrices).is_dir() else Path(matrices)
        where, matrices = f"FlatQuant's {path}", read_pickled(path, "FlatQuant's")
    prepared = prepare(model, weights=False)
    names = [stage for stage in prepared.stages if all(f"{stage}.{layer}" in {site.name for site in prepared.linears} for layer in INPUTS)]
    if not names:
        raise ValueError(f"FlatQuant's files are of Llama, Mistral, Qwen2 or Qwen3, a {type(model).__name__} is none")
    if not isinstance(matrices, Mapping) or not all(isinstance(block, Mapping) for block in matrices.values()):
        raise ValueError(f"{where}: not a mapping of block numbers to tensors by name; flat_parameters.pth and others are none: give {FILE}")
    if set(matrices) != set(range(len(names))):
        raise ValueError(f"{where}: has blocks {sorted(matrices, key=str)}, this {type(model).__name__} has 0 to {len(names) - 1}")
    found: dict[str, InputParams] = {}
    blocks = []
    for i, name in enumerate(names):
        block = FlatBlock(f"{where}, block {i}", matrices[i])
        outputs = {layer: [model.get_submodule(source).out_features for source in source_names(f"{name}.{layer}")] for layer in INPUTS}
        for layer, trans in INPUTS.items():
            params = block.input(layer, trans, prepared.model.get_submodule(f"{name}.{layer}").in_features, outputs[layer])
            found[f"{name}.{layer}"] = params
        found.update({f"{name}.self_attn.{key}": params for key, params in block.cache().items()})
        block.done()
        blocks.append(block)
    warn_of_spread(where, blocks)
    return found


def warn_of_spread(where: str, blocks: Iterable[FlatBlock]) -> None:
    """Say so where layers that share an input clip it in ways that are far apart."""
    worst = max(blocks, key=lambda block: block.spread)
    if worst.spread > SPREAD:
        log.warning("%s: layers that read one input clip it in ways that differ by up to %.3f of its range (%s); here they share the mean", where,
                    worst.spread, worst.where)


class FlatBlock:
    """The tensors of one block by their names in it, each to be taken once. where: how messages begin. spread: how far clips of layers that share an input
    are apart, at most."""

    def __init__(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        self.where, self.tensors, self.taken, self.spread = where, tensors, set(), 0.0
        odd = next((name for name, t in tensors.items() if not (isinstance(t, Tensor) and t.is_floating_point() and bool(t.isfinite().all()))), None)
        if odd is not None:
            raise ValueError(f"{where}: {odd!r} is no tensor of finite floats")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """float32 of this shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.where}: {name!r} is missing")
        self.taken.add(name)
        tensor = self.tensors[name].detach().float().cpu()
        if tensor.shape != shape:
            raise ValueError(f"{self.where}: {name!r} is {list(tensor.shape)}, the model needs {list(shape)}")
        return tensor

    def matrix(self, name: str, inverse: str) -> Tensor:
        """float32 [n, n], checked against the transpose of its inverse."""
        n = self.tensors[name].shape[-1] if name in self and self.tensors[name].dim() else 0
        matrix, other = self.take(name, n, n).double(), self.take(inverse, n, n).double()
        error = float((matrix @ other.T - torch.eye(n, dtype=torch.float64)).abs().max())
        # What rounding of both to the type they are stored in makes of it, in matrices that are far from orthogonal.
        rounding = torch.finfo(self.tensors[name].dtype).eps * float(torch.linalg.matrix_norm(matrix, 2) * torch.linalg.matrix_norm(other, 2))
        if not error < INVERSE_ERROR + rounding:
            raise ValueError(f"{self.where}: {inverse!r} is not the transpose of the inverse of {name!r} (times it, it is off by {error:.3g})")
        return matrix.float()

    def single(self, trans: str, n: int) -> Tensor:
        """The matrix [n, n] of a transform that has one."""
        matrix = self.matrix(f"{trans}.matrix", f"{trans}.matrix_inv_t")
        if len(matrix) != n:
            raise ValueError(f"{self.where}: {trans!r} has a matrix of {len(matrix)} x {len(matrix)}, the model needs {n} x {n}")
        return matrix

    def clip(self, quantizer: str) -> Tensor:
        """float32 [2], of the least and of the largest number of a row; ones where nothing was learned."""
        names = [f"{quantizer}.clip_factor_a_{end}" for end in ("min", "max")]
        if not any(name in self for name in names):
            return torch.ones(2)
        return torch.cat([self.take(name, *(self.tensors[name].shape if name in self and self.tensors[name].numel() == 1 else (1,))).reshape(1)
                          for name in names]).sigmoid()

    def shared_clip(self, sources: list[str]) -> Tensor:
        """The mean of the clips of layers that share an input."""
        clips = torch.stack([self.clip(f"{source}.act_quantizer") for source in sources])
        self.spread = max(self.spread, float((clips.amax(0) - clips.amin(0)).max()))
        return clips.mean(0)

    def ratios(self, source: str, outputs: int) -> Tensor:
        """float32 [N, 2], of the least and of the largest weight of each output."""
        names = [f"{source}.clip_factor_w_{end}" for end in ("min", "max")]
        if not any(name in self for name in names):
            return torch.ones(outputs, 2)
        return torch.cat([self.take(name, outputs, 1) for name in names], 1).sigmoid()

    def divisor(self, trans: str, features: int) -> Tensor | None:
        """What channels are divided by: FlatQuant multiplies them by `diag_scale`."""
        if f"{trans}.diag_scale" not in self:
            return None
        scale = self.take(f"{trans}.diag_scale", features)
        if not bool((scale != 0).all()):
            raise ValueError(f"{self.where}: '{trans}.diag_scale' holds zeros")
        return 1.0 / scale

    def kronecker(self, trans: str, features: int) -> Kronecker:
        left, right = (self.matrix(f"{trans}.matrix_{side}", f"{trans}.matrix_{side}_inv") for side in ("left", "right"))
        if len(left) * len(right) != features:
            raise ValueError(f"{self.where}: {trans!r} has matrices of {len(left)} and {len(right)} for {features} input features")
        return Kronecker(left.half(), right.half())

    def input(self, layer: str, trans: str, features: int, outputs: list[int]) -> InputParams:
        """Of the input that `layer` of the canonical form reads. outputs: of each layer that it stands for."""
        sources = list(source_names(layer))
        ratios = torch.cat([self.ratios(source, n) for source, n in zip(sources, outputs)])
        clip = self.shared_clip(sources)
        if layer != "self_attn.o_proj":
            return InputParams(self.divisor(trans, features), None, self.kronecker(trans, features), clip, ratios, clamped=True)
        heads = self.single(trans, self.tensors[f"{trans}.matrix"].shape[-1] if f"{trans}.matrix" in self else 0)
        if features % len(heads):
            raise ValueError(f"{self.where}: {trans!r} mixes {len(heads)} heads, which do not divide {features} input features")
        values = self.single("self_attn.vcache_trans", features // len(heads))
        return InputParams(None, values, Kronecker(left=heads.half()), clip, ratios, clamped=True)

    def cache(self) -> dict[str, InputParams]:
        """Of the keys (qk), where they were to be quantized, and of the values (pv)."""
        if any(name.startswith("self_attn.q_cache_quantizer.") for name in self.tensors):
            raise ValueError(f"{self.where}: queries are quantized (--q_bits), which vitq leaves in float")
        found = {"pv": InputParams(clip=self.clip("self_attn.v_cache_quantizer"))}
        if "self_attn.kcache_trans.matrix" in self:
            keys = self.matrix("self_attn.kcache_trans.matrix", "self_attn.kcache_trans.matrix_inv_t")
            found["qk"] = InputParams(transform=Kronecker(right=keys.half()), clip=self.clip("self_attn.k_cache_quantizer"))
        return found

    def done(self) -> None:
        """Raises ValueError for tensors that nothing took."""
        if left := sorted(self.tensors.keys() - self.taken):
            raise ValueError(f"{self.where}: {', '.join(left[:3])}{' …' if len(left) > 3 else ''} are not known: nothing here would use them")
