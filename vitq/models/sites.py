"""What an adapter finds in a model: named places that can be quantized, in the field's own roles.

`sites` know nothing of quantization. A name is the dotted module name in the source model; it is what recipes match,
what statistics are keyed by and what `vitq.explain` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearSite:
    """An `nn.Linear` (or a patch-embedding `nn.Conv2d` whose stride is its kernel).

    norm: the norm whose output feeds this linear, and others that name it too, and nothing else, so that a per-channel scale and shift
        can be moved from the one into the other; None where there is none.
    zero_padded: zeros are inserted between norm and linear (Swin pads incomplete windows), so a shift folded into the
        norm would turn them into something else; a scale may still be folded.
    rows: a linear layer and the first of those of its outputs that this one's inputs are proportional to, channel by channel, and that
        feed nothing else: a scale, not a shift, can be moved from the one into the other. (down_proj reads act(gate) · up: the rows of up.)
    """

    name: str
    role: str
    norm: str | None = None
    zero_padded: bool = False
    rows: tuple[str, int] | None = None


@dataclass(frozen=True)
class AttentionSite:
    """A `TappedAttention`: its two matmuls are the layers `NAME.qk` and `NAME.pv`."""

    name: str

    @property
    def qk(self) -> str:
        return f"{self.name}.qk"

    @property
    def pv(self) -> str:
        return f"{self.name}.pv"


@dataclass(frozen=True)
class HeadSite:
    """An attention whose heads can be told apart: the linear layers `qkv` and `proj`. Its `units` are what can be moved alone: a key and value
    head with the query heads that share it.

    sections: the rows of qkv are that many rows a unit, unit by unit, in each of these sections; columns: of proj, those of each unit.
    """

    name: str
    qkv: str
    proj: str
    units: int
    sections: tuple[int, ...]
    columns: int
    queries: int = 1  # query heads of a unit

    @property
    def query_heads(self) -> int:
        return self.units * self.queries

    @property
    def head_dim(self) -> int:
        return self.columns // self.queries

    @property
    def first_value(self) -> int:
        """The first of qkv's rows that make values, which are its last section."""
        return self.units * sum(self.sections[:-1])


@dataclass(frozen=True)
class CacheSite:
    """The attention of a language model, whose keys and values enter the cache through its module `kv`, [B, heads, tokens, D]. Its matmuls,
    in float, are `NAME.qk` and `NAME.pv`.

    part: of an attention in parts, the one that this site stands for; heads: its key and value heads. The names above then end in `.PART`.
    """

    name: str
    part: str = ""
    heads: int | None = None

    @property
    def qk(self) -> str:
        return self._of("qk")

    @property
    def pv(self) -> str:
        return self._of("pv")

    def _of(self, child: str) -> str:
        return ".".join(filter(None, (self.name, child, self.part)))

    @property
    def kv(self) -> str:
        return self._of("kv")


@dataclass(frozen=True)
class MlpSite:
    """fc1 -> activation -> fc2 with nothing in between. `activation` is gelu, gelu_tanh, relu, or None if unknown."""

    name: str
    activation: str | None


@dataclass(frozen=True)
class BlockSite:
    """x + attn(norm1(x)), then x + mlp(norm2(x)), with both norms plain LayerNorms. `kind`: 'plain' or 'window'; or 'decoder', of a language model, with
    RMSNorms and a gated MLP."""

    name: str
    kind: str = "plain"


@dataclass(frozen=True)
class MergeSite:
    """Swin's patch merging: 2 x 2 neighbours side by side, a plain LayerNorm `NAME.norm`, the linear layer `NAME.reduction`."""

    name: str


@dataclass(frozen=True)
class StemSite:
    """A stem that is a plain patch embedding of images of one size. kind 'tokens': its patches follow the `prefix` parameters
    [1, n, C] of the root, and `position` [1, N, C] is added to all, or to the patches alone if `patches_only`; nothing else
    happens before the blocks but `norm_pre`. kind 'image': they stay an image [B, H, W, C] and go through a norm."""

    kind: str
    prefix: tuple[str, ...] = ()
    position: str = ""
    patches_only: bool = False


@dataclass(frozen=True)
class FloatSite:
    """A part with weights that stays in float on purpose, and why."""

    name: str
    reason: str


@dataclass
class Prepared:
    """A float copy of the source model in canonical form, and the sites found in it.

    Canonical: eval mode, float32, attention replaced by `TappedAttention`, LayerScale folded into the linear before it.
    Its output equals the source model's up to float rounding.
    """

    model: nn.Module
    linears: list[LinearSite] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    caches: list[CacheSite] = field(default_factory=list)
    mlps: list[MlpSite] = field(default_factory=list)
    blocks: list[BlockSite] = field(default_factory=list)
    merges: list[MergeSite] = field(default_factory=list)
    floats: list[FloatSite] = field(default_factory=list)
    stem: StemSite | None = None
    exact: list[str] = field(default_factory=list)  # modules whose numbers stay in float32
    tokens: bool = False  # the model reads token ids [B, T], not images
    stages: list[str] = field(default_factory=list)  # the blocks: each reads what the one before it returned, and nothing else does
    heads: list[HeadSite] = field(default_factory=list)
    joint_heads: str = ""  # why the heads of some attention cannot be told apart; empty where they can

    @property
    def samples(self) -> str:
        """What the model reads, in a message."""
        return "sequences" if self.tokens else "images"

    def input_groups(self) -> list[list[LinearSite]]:
        """The linear sites in order, those that share a norm together."""
        groups: dict[str, list[LinearSite]] = {}
        for site in self.linears:
            groups.setdefault(site.norm or f"{site.name}.", []).append(site)
        return list(groups.values())

    def run(self, batch: Tensor) -> Tensor:
        """The model on one batch of what it reads, on its own device."""
        device = next(self.model.parameters()).device
        if self.tokens:
            return self.model(batch.to(device), use_cache=False).logits
        return self.model(batch.to(device, torch.float32))
