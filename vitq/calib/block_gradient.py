"""Learn, for one block at a time, what is done to inputs before they are quantized (FlatQuant, Sun et al., ICML 2025, arXiv 2410.09426).

Of each input that layers share: the matrices that mix its numbers, a scale of each channel where one can be moved into what makes it, and how far ranges are
clipped, one clip for all layers that read it, so that it is quantized once. Of each layer how far its weight's ranges are clipped; of an attention the
matrices of its keys and of its values. They are found by gradients of the squared error between what the quantized block returns and what the float one does;
rounding passes gradients on as they are. Codes of weights come afterwards, from the recipe's solver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitq.calib.chain import Given
from vitq.calib.descent import Batch, NotFinite, descend
from vitq.calib.matrices import capturable, equals, matrix_of
from vitq.calib.online import divisible, input_sizes, mixed_values
from vitq.formats import RANGE_MIN, ActivationFormat, Kronecker, int_range
from vitq.models.sites import CacheSite, HeadSite, LinearSite, Prepared
from vitq.plan import CacheParams, InputParams, Plan
from vitq.recipe import LayerSpec, QuantSpec, Recipe
from vitq.transforms.smooth import bounded_scale
from vitq.transforms.values import value_columns, value_rows

DEFAULTS: dict[str, Any] = {"epochs": 15, "batch_size": 4, "learning_rate": 5e-3, "diagonal": False, "matrices": "svd", "warmup": 0,
                            "mixed_precision": False, "seed": 0}
CLIP_START = 4.0  # of a logit: 0.982 of the range
LARGEST_CONDITION = 1e5  # of a matrix in float16, whose inverse is in the weights


def clip_now(logits: Tensor | None, spec: QuantSpec, like: Tensor) -> Tensor | None:
    """What ends of ranges are multiplied with, [2]: as learned so far, or as the recipe says."""
    if logits is not None:
        return logits.sigmoid()
    return None if spec.clip_ratio == 1.0 else like.new_full((2,), spec.clip_ratio)


class Rounded(torch.autograd.Function):
    """torch.round whose gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def fake_rows(x: Tensor, bits: int, symmetric: bool, clip: Tensor | None) -> Tensor:
    """What codes of each row of x [..., K] stand for, as `vitq.quantizers.uniform` has them, with gradients to x and to clip [2] or [N, 2]."""
    qmin, qmax = int_range(bits)
    lo, hi = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # torch 2.11 has no derivative of aminmax
    if clip is not None:
        of_lo, of_hi = clip.split(1, -1)
        lo, hi = lo.clamp_max(0.0) * of_lo, hi.clamp_min(0.0) * of_hi
    if symmetric:
        scale = torch.maximum(-lo, hi).clamp_min(RANGE_MIN) / qmax
        return Rounded.apply(x / scale).clamp(qmin, qmax) * scale
    scale = (hi - lo).clamp_min(RANGE_MIN) / (qmax - qmin)
    return Rounded.apply((x - lo) / scale).clamp(0, qmax - qmin) * scale + lo


def fake_weight(weight: Tensor, spec: QuantSpec, clip: Tensor | None) -> Tensor:
    """The same of a weight [N, K], by rows or groups of columns. clip: [N, 2] where it is learned."""
    if spec.granularity == "per_tensor":
        return fake_rows(weight.flatten(), spec.bits, spec.symmetric, None).view_as(weight)
    if spec.granularity != "per_group":
        return fake_rows(weight, spec.bits, spec.symmetric, clip)
    rest = -weight.shape[1] % spec.group_size
    groups = nn.functional.pad(weight, (0, rest)).unflatten(1, (-1, spec.group_size))
    return fake_rows(groups, spec.bits, spec.symmetric, None).flatten(1)[:, : weight.shape[1]]


class SharedInput(nn.Module):
    """The input of layers that share it, and these layers' weights."""

    def __init__(self, sites: list[LinearSite], model: nn.Module, specs: Mapping[str, LayerSpec], options: Mapping[str, Any],
                 heads: Mapping[str, HeadSite], generator: torch.Generator) -> None:
        super().__init__()
        self.sites = sites
        self.linears = {site.name: model.get_submodule(site.name) for site in sites}
        self.specs = {site.name: specs[site.name] for site in sites}
        first = self.specs[sites[0].name]
        self.spec, features = first.input, self.linears[sites[0].name].in_features
        a, b = input_sizes(sites[0].name, first, features, heads)
        self.left, self.right = (matrix_of(self.spec.transform, n, options, generator) for n in (a, b))
        self.log_divisor = nn.Parameter(torch.zeros(features)) if options["diagonal"] and divisible(model, sites) else None
        self.clip = nn.Parameter(torch.full((2,), CLIP_START)) if self.spec.observer == "learned" else None
        self.clips = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(torch.full((linear.out_features, 2), CLIP_START))
                                       for name, linear in self.linears.items() if self.specs[name].weight.observer == "learned"})
        site = heads.get(sites[0].name)
        self.values = None if site is None or self.spec.transform == "none" else matrix_of(
            self.spec.transform, site.head_dim, options, generator)

    @property
    def value_pair(self) -> tuple[Tensor, Tensor] | None:
        return None if self.values is None else self.values.pair

    def read(self, x: Tensor) -> Tensor:
        """What the layers read in the place of x [..., K]: scaled, mixed and quantized."""
        with torch.autocast(x.device.type, enabled=False):
            y = x.float()
            if self.log_divisor is not None:
                y = y * (-self.log_divisor).exp()
            y = self._mixed(y, 0)
            return fake_rows(y, self.spec.bits, self.spec.symmetric, clip_now(self.clip, self.spec, y))

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """The quantized weight for what `read` gives."""
        if self.value_pair is not None:
            weight = value_columns(weight, self.value_pair[1])
        if self.log_divisor is not None:
            weight = weight * self.log_divisor.exp()
        return fake_weight(self._mixed(weight, 1), self.specs[name].weight, self._ratios(name))

    def _ratios(self, name: str) -> Tensor | None:
        """What ends of the rows of a layer's weight are multiplied with, [N, 2], where it is learned."""
        key = name.replace(".", "/")
        return self.clips[key].sigmoid() if key in self.clips else None

    def _mixed(self, x: Tensor, side: int) -> Tensor:
        """Rows of x times the matrices (side 0) or the transposes of their inverses (1)."""
        left, right = (None if m is None else m.pair[side] for m in (self.left, self.right))
        if left is None and right is None:
            return x
        shape = x.shape
        x = x.unflatten(-1, (-1, len(right))) if left is None else x.unflatten(-1, (len(left), -1))
        x = x if right is None else x @ right
        return (x if left is None else left.mT @ x).reshape(shape)

    @torch.no_grad()
    def found(self) -> InputParams:
        """What was learned, on the CPU. Hadamard's matrices, and those of layers that do not learn any, are None: they need not be found again."""
        learned = self.spec.transform == "learned"
        online = [None if m is None or not learned else m.pair[0].half().cpu() for m in (self.left, self.right)]
        divisor = None if self.log_divisor is None else self.log_divisor.exp().cpu()
        if divisor is not None and self.sites[0].norm is None:
            divisor = bounded_scale(divisor)
        ratios = [torch.ones(linear.out_features, 2) if (learned_ratios := self._ratios(name)) is None else learned_ratios.cpu()
                  for name, linear in self.linears.items()]
        return InputParams(divisor, None if self.value_pair is None or not learned else self.value_pair[0].cpu(),
                           None if online == [None, None] else Kronecker(*online), None if self.clip is None else self.clip.sigmoid().cpu(),
                           torch.cat(ratios) if len(self.clips) else None)


class CacheRows(nn.Module):
    """Keys or values of an attention, [B, heads, T, D], as they enter its cache."""

    def __init__(self, spec: QuantSpec, features: int, options: Mapping[str, Any], generator: torch.Generator) -> None:
        super().__init__()
        self.spec = spec
        self.matrix = None if spec.transform == "none" else matrix_of(spec.transform, features, options, generator)
        self.clip = nn.Parameter(torch.full((2,), CLIP_START)) if spec.observer == "learned" else None

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        return None if self.matrix is None else self.matrix.pair

    def read(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = x.float() if self.pair is None else x.float() @ self.pair[0]
            y = fake_rows(y, self.spec.bits, self.spec.symmetric, clip_now(self.clip, self.spec, y))
            return (y if self.pair is None else y @ self.pair[1].mT).to(x.dtype)

    @torch.no_grad()
    def found(self, fmt: ActivationFormat) -> ActivationFormat:
        transform = fmt.transform if self.pair is None or self.spec.transform != "learned" else Kronecker(right=self.pair[0].half().cpu())
        return ActivationFormat(fmt.bits, dynamic=True, symmetric=fmt.symmetric, transform=transform,
                                clip=fmt.clip if self.clip is None else self.clip.sigmoid().cpu())


@dataclass
class Learned:
    """inputs: what was found of each input, by the name of the first layer that reads it; caches: formats of keys and values, by module; errors: the mean
    squared error of the block over the data in the first and in the last epoch, as parts of the mean square of its output."""

    inputs: dict[str, InputParams]
    caches: dict[str, CacheParams]
    errors: tuple[float, float]


def learns(specs: Iterable[LayerSpec], options: Mapping[str, Any]) -> bool:
    """Whether something of the input of layers with these specs, or of their weights, is to be learned."""
    def wanted(spec: LayerSpec) -> bool:
        if not spec.is_dynamic:
            return False
        return options["diagonal"] or "learned" in (spec.input.transform, spec.input.observer, spec.weight.observer)

    return any(map(wanted, specs))


def learn(model: nn.Module, name: str, groups: list[list[LinearSite]], caches: list[CacheSite], formats: Mapping[str, CacheParams], plan: Plan,
          heads: Mapping[str, HeadSite], run: Callable[[Given, Tensor, dict[str, Tensor] | None], Tensor], given: list[Given],
          inputs: list[Tensor], targets: list[Tensor] | None) -> Learned:
    """What is to be learned of one block, `name` in the model, whose layers are on the device.

    groups: its layers by the input they share; caches, formats: its attentions that quantize keys or values, and how before anything is learned. 
    run(given, hidden, parameters): what the block returns of hidden states, on the device, with these in the place of its own parameters. given: what it is
    given beside them, of each batch; inputs: hidden states before the block, one tensor a batch, on the CPU; targets: what it is to return of each, None for
    what the float block makes of the inputs.

    Raises ValueError for layers that share an input and quantize it in different ways, and where the error becomes NaN.
    """
    options = {**DEFAULTS, **plan.recipe.block_gradient}
    generator = torch.Generator().manual_seed(options["seed"])
    shared = [SharedInput(sites, model, plan.specs, options, heads, generator) for sites in map(partial(integer_sites, plan=plan), groups) if sites]
    rows = {}
    for site in caches:
        if site.kv in formats:
            features = model.get_submodule(site.name).head_dim
            rows[site.kv] = [None if fmt is None else CacheRows(plan.specs[of].cached, features, options, generator)
                             for of, fmt in ((site.qk, formats[site.kv].k), (site.pv, formats[site.kv].v))]
    modules = nn.ModuleList([*shared, *(row for pair in rows.values() for row in pair if row is not None)])
    device = next(model.get_submodule(name).parameters()).device
    modules.to(device)
    if targets is None:
        with torch.no_grad():
            targets = [run(of, hidden, None).float().cpu() for of, hidden in zip(given, inputs)]
    inputs, targets = (_near(states, device) for states in (inputs, targets))
    producers = {heads[one.sites[0].name].qkv: (one, heads[one.sites[0].name]) for one in shared if one.values is not None}

    def parameters() -> dict[str, Tensor]:
        """Those of the block's layers, quantized, by their names in it."""
        made = {}
        for one in shared:
            for layer, linear in one.linears.items():
                weight, bias = linear.weight, linear.bias
                if layer in producers:
                    of, site = producers[layer]
                    weight = value_rows(weight, site.first_value, of.value_pair[0])
                    bias = None if bias is None else value_rows(bias, site.first_value, of.value_pair[0])
                inside = layer.removeprefix(f"{name}.")
                made[f"{inside}.weight"] = one.weight(layer, weight)
                if bias is not None:
                    made[f"{inside}.bias"] = bias
        return made

    matrices = equals(modules)

    def error(batch: Batch) -> Tensor:
        """The squared error of a batch."""
        for equal in matrices:
            equal.make()
        with torch.autocast(device.type, torch.bfloat16, enabled=options["mixed_precision"]):
            output = run(batch.given, batch.hidden, parameters())
        return (output.float() - batch.target.to(device)).square().sum()

    handles = [linear.register_forward_pre_hook(lambda module, args, one=one: (one.read(args[0]), *args[1:]))
               for one in shared for linear in one.linears.values()]
    for kv, pair in rows.items():
        module = model.get_submodule(kv)
        handles += [tap.register_forward_hook(lambda module, args, output, row=row: row.read(output))
                    for tap, row in zip((module.tap_k, module.tap_v), pair) if row is not None]
    try:
        with torch.enable_grad(), capturable(matrices):
            errors = descend(modules, error, list(map(Batch, given, inputs, targets)), options, device, generator)
    except NotFinite as stopped:
        raise ValueError(f"block_gradient: the error of {name!r} is no longer finite in epoch {stopped.args[0] + 1}: give a smaller "
                         "block_gradient.learning_rate, or mixed_precision: false") from None
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for equal in matrices:
            equal.make()
    found = Learned({one.sites[0].name: one.found() for one in shared},
                    {kv: CacheParams(*(fmt if row is None else row.found(fmt) for row, fmt in zip(pair, (formats[kv].k, formats[kv].v))))
                     for kv, pair in rows.items()}, errors)
    for params in (*found.inputs.values(), *(fmt for pair in found.caches.values() for fmt in (pair.k, pair.v) if fmt is not None)):
        _check_invertible(params.transform, name)
    return found


def _near(states: list[Tensor], device: torch.device) -> list[Tensor]:
    """The hidden states on the device, where they take a quarter of its free memory at most: they are read again in each epoch."""
    size = sum(t.numel() * t.element_size() for t in states)
    return [t.to(device) for t in states] if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4 else states


def _check_invertible(transform: Kronecker | None, name: str) -> None:
    for matrix in () if transform is None else (transform.left, transform.right):
        if matrix is not None and not (bool(matrix.isfinite().all()) and float(torch.linalg.cond(matrix.double())) < LARGEST_CONDITION):
            raise ValueError(f"block_gradient: a matrix of {name!r} can no longer be inverted: give a smaller block_gradient.learning_rate")


def check_learned(prepared: Prepared, specs: Mapping[str, LayerSpec], recipe: Recipe) -> None:
    """Raises ValueError for a layer outside of the blocks of which something is to be learned."""
    options = {**DEFAULTS, **recipe.block_gradient, "diagonal": False}  # which is for those that have one
    for site in prepared.linears if recipe.learns else ():
        if site.name in specs and learns([specs[site.name]], options) and not any(site.name.startswith(f"{stage}.") for stage in prepared.stages):
            raise ValueError(f"recipe {recipe.name!r}: {site.name!r} is in no block, and block_gradient learns in blocks alone: give it "
                             "transform: hadamard or none, and another observer")


def integer_sites(sites: list[LinearSite], plan: Plan) -> list[LinearSite]:
    """Those whose input is quantized at run time. Raises ValueError where they do not quantize it in one way."""
    found = [site for site in sites if plan.specs[site.name].is_dynamic]
    odd = next((site for site in found if plan.specs[site.name].input != plan.specs[found[0].name].input), None)
    if odd is not None and learns((plan.specs[site.name] for site in found), {**DEFAULTS, **plan.recipe.block_gradient}):
        raise ValueError(f"recipe {plan.recipe.name!r} quantizes the input that {found[0].name!r} and {odd.name!r} share in two ways: what is learned of "
                         "it is for both, so give both the same input.* fields")
    return found


def fitted(prepared: Prepared, plan: Plan, learned: Mapping[str, InputParams]) -> dict[str, InputParams]:
    """What was learned elsewhere (`vitq.import_flatquant`) of the inputs, and of the keys and values of caches, that the plan's recipe quantizes at run
    time, by the name of the first layer that reads one, or of the matmul. Raises ValueError where it is not what the recipe and the model have."""
    model, heads, found = prepared.model, mixed_values(prepared, plan.specs), {}
    known = {site.name for site in prepared.linears} | {name for site in prepared.caches for name in (site.qk, site.pv)}
    if unknown := sorted(learned.keys() - known):
        raise ValueError(f"learned: {', '.join(unknown[:3])} are no layers of this {type(model).__name__}: it is of another model")

    def of(name: str, spec: QuantSpec) -> InputParams:
        if (params := learned.get(name)) is None:
            raise ValueError(f"learned: nothing is there of {name!r}, which recipe {plan.recipe.name!r} quantizes at run time: give what was learned of this "
                             "model with such a recipe, or leave that layer in float")
        for has, wants, key in ((params.transform is not None, spec.transform == "learned", "transform"),
                                (params.clip is not None and bool((params.clip != 1).any()), spec.observer == "learned", "observer")):
            if has and not wants:
                raise ValueError(f"learned: {name!r} has its own {key}, and recipe {plan.recipe.name!r} has {key}: {getattr(spec, key)!r} there: give "
                                 f"{key}: learned")
        if spec.observer == "learned":
            return params if params.clip is not None else replace(params, clip=torch.ones(2))
        return replace(params, clip=None)

    def check_sizes(name: str, params: InputParams, wanted: tuple[int | None, int | None]) -> None:
        online = (None, None) if params.transform is None else (params.transform.left, params.transform.right)
        if (has := tuple(None if m is None else len(m) for m in online)) != wanted:
            said, needs = (" and ".join(f"{n} x {n}" for n in sizes if n) or "none" for sizes in (has, wanted))
            raise ValueError(f"learned: the matrices of {name!r} are {said}, and vitq divides its rows by {needs}")
        _check_invertible(params.transform, name)

    for sites in prepared.input_groups():
        if not (ours := integer_sites(sites, plan)):
            continue
        name, linear = ours[0].name, model.get_submodule(ours[0].name)
        params, spec = of(name, plan.specs[name].input), plan.specs[name]
        check_sizes(name, params, input_sizes(name, spec, linear.in_features, heads) if spec.input.transform == "learned" else (None, None))
        rows, site = sum(model.get_submodule(site.name).out_features for site in ours), heads.get(name)
        shapes = {"divisor": [linear.in_features] if divisible(model, ours) else None, "ratios": [rows, 2],
                  "values": None if site is None or spec.input.transform != "learned" else [site.head_dim] * 2}
        for key, shape in shapes.items():
            has = None if (tensor := getattr(params, key)) is None else list(tensor.shape)
            if has is not None and has != shape:
                raise ValueError(f"learned: {key} of {name!r} is {has}, " + (f"it needs {shape}" if shape else "and there is nothing to put it into"))
        found[name] = params if params.ratios is not None else replace(params, ratios=torch.ones(rows, 2))
    for site in prepared.caches:
        for name in (site.qk, site.pv):
            if name in plan.specs and (cached := plan.specs[name].cached) is not None:
                found[name] = of(name, cached)
                check_sizes(name, found[name], (None, model.get_submodule(site.name).head_dim if cached.transform == "learned" else None))
    return found
