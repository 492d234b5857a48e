"""Attentions in parts: the rows of qkv and the columns of proj of some heads, `least`, and those of the others, `rest`, as layers of their own.

Heads change places for it, the chosen ones come first, which changes nothing but the order of sums: rows of q, k and v and columns of proj move
together, a key and value head with the query heads that share it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace as replaced

import torch
from torch import Tensor, nn

from vitq.models.adapter import replace
from vitq.models.language import KeyValues
from vitq.models.sites import CacheSite, HeadSite, LinearSite, Prepared

PARTS = ("least", "rest")


class RowParts(nn.Module):
    """x [..., K] -> [..., N], N the rows of the children `least` and `rest` (either may be missing), interleaved by `sections`: in each as many
    rows a unit as it says, those of least first. counts: units of the two."""

    def __init__(self, parts: Mapping[str, nn.Linear], counts: tuple[int, int], sections: tuple[int, ...]):
        super().__init__()
        self.splits = [[count * rows for rows in sections] for count in counts if count]
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.children()]
        if len(outputs) == 1:
            return outputs[0]
        split = (y.split(sizes, dim=-1) for y, sizes in zip(outputs, self.splits))
        return torch.cat([y for section in zip(*split) for y in section], dim=-1)


class ColumnParts(nn.Module):
    """x [..., K] -> [..., N], the sum of what the children `least` and `rest` (either may be missing) make of the first features and of the
    others. widths: their input features."""

    def __init__(self, parts: Mapping[str, nn.Linear], widths: Sequence[int]):
        super().__init__()
        self.widths = [width for width in widths if width]
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.children())
        if len(parts) == 1:
            return parts[0](x)
        (least, rest), (first, others) = parts, x.split(self.widths, dim=-1)
        y = rest(others)
        if getattr(least, "adds_residual", False):
            return least(first, residual=y, inplace=True)
        return y + least(first)


class KeyValueParts(KeyValues):
    """`KeyValues` of the children `least` and `rest` (either may be missing): of the first key and value heads and of the others. counts: heads of
    each child."""

    def __init__(self, parts: Mapping[str, KeyValues], counts: Sequence[int]):
        super().__init__()
        del self.tap_k, self.tap_v
        self.counts = list(counts)
        for name, part in parts.items():
            setattr(self, name, part)

    def tapped(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self.children(), k.split(self.counts, dim=1), v.split(self.counts, dim=1))
        return tuple(torch.cat(heads, dim=1) for heads in zip(*(part.tapped(*heads) for part, *heads in parts)))


def units_of(site: HeadSite, chosen: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The units of each part of an attention in their new order; a part without units is left out."""
    least = sorted(chosen.get(site.name, ()))
    units = dict(zip(PARTS, (least, [unit for unit in range(site.units) if unit not in least])))
    return {part: of for part, of in units.items() if of}


def rows_of(site: HeadSite, units: Collection[int]) -> list[int]:
    """Rows of qkv of these units, section by section."""
    rows, start = [], 0
    for width in site.sections:
        rows += [start + unit * width + i for unit in units for i in range(width)]
        start += site.units * width
    return rows


def columns_of(site: HeadSite, units: Collection[int]) -> list[int]:
    """Columns of proj of these units."""
    return [unit * site.columns + i for unit in units for i in range(site.columns)]


def check_heads(prepared: Prepared) -> None:
    """Raises ValueError, with the reason, for a model whose attentions cannot be had in parts."""
    why = prepared.joint_heads or next((f"{site.name!r} has one key and value head for all query heads, which would move as one"
                                        for site in prepared.heads if site.units == 1), "" if prepared.heads else "it has no attention")
    if why:
        raise ValueError(f"heads of this {type(prepared.model).__name__} cannot have formats of their own: {why}; leave out the recipe's heads")


def check_chosen(prepared: Prepared, chosen: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError for a layer or a unit that the model has not."""
    sites = {site.name: site for site in prepared.heads}
    for name, units in chosen.items():
        if name not in sites:
            raise ValueError(f"heads.chosen: there is no attention {name!r}; the model's are {', '.join(list(sites)[:3])}, …")
        if wrong := [unit for unit in units if not 0 <= unit < sites[name].units]:
            shared = f", {sites[name].queries} query heads each" if sites[name].queries > 1 else ""
            raise ValueError(f"heads.chosen: {name!r} has no head {wrong[0]}; its {sites[name].units} key and value heads{shared} are 0 to "
                             f"{sites[name].units - 1}")


@torch.no_grad()
def part_heads(prepared: Prepared, chosen: Mapping[str, Sequence[int]]) -> None:
    """Put each attention of `prepared` into parts, in place: the units in `chosen`, by the attention's name, are `least`, the others `rest`. The
    model computes what it did, up to the order of sums. Raises ValueError as `check_heads` and `check_chosen`."""
    check_heads(prepared)
    check_chosen(prepared, chosen)
    moved: dict[str, list[LinearSite]] = {}
    caches: dict[str, list[CacheSite]] = {}
    linears = {site.name: site for site in prepared.linears}
    for site in prepared.heads:
        units = units_of(site, chosen)
        first = units.get("least", [])
        qkv, proj = (prepared.model.get_submodule(name) for name in (site.qkv, site.proj))
        rows = {part: _part(qkv, rows=rows_of(site, of)) for part, of in units.items()}
        biased = list(units)[-1]  # one of the two adds it
        columns = {part: _part(proj, columns=columns_of(site, of), bias=part == biased) for part, of in units.items()}
        replace(prepared.model, site.qkv, RowParts(rows, (len(first), site.units - len(first)), site.sections))
        replace(prepared.model, site.proj, ColumnParts(columns, [part.in_features for part in columns.values()]))
        moved.update({name: [replaced(linears[name], name=f"{name}.{part}") for part in units] for name in (site.qkv, site.proj)})
        if any(cache.name == site.name for cache in prepared.caches):
            counts = {part: len(of) for part, of in units.items()}
            replace(prepared.model, f"{site.name}.kv", KeyValueParts({part: KeyValues() for part in units}, list(counts.values())))
            caches[site.name] = [CacheSite(site.name, part, count) for part, count in counts.items()]
    prepared.caches = [part for cache in prepared.caches for part in caches.get(cache.name, [cache])]
    prepared.linears = [part for site in prepared.linears for part in moved.get(site.name, [site])]


def _part(linear: nn.Linear, *, rows: list[int] | None = None, columns: list[int] | None = None, bias: bool = True) -> nn.Linear:
    """A linear layer with these rows or columns of another, and its bias (or those rows of it) if wanted."""
    def index(of: list[int]) -> Tensor:
        return torch.tensor(of, device=linear.weight.device)

    weight = linear.weight[index(rows)] if rows is not None else linear.weight[:, index(columns)]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None and bias, device="meta")
    part.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if part.bias is not None:
        part.bias = nn.Parameter(linear.bias.clone() if rows is None else linear.bias[index(rows)], requires_grad=False)
    return part.eval()
