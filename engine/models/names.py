"""What each tensor of a ModelSpec is called in a checkpoint, which shape it has and where it goes.

The tables map our names to checkpoint modules; the same rows serve quantization, whose output keeps
the checkpoint's names. LLaVA wraps a decoder's names in one of two prefixes; `layout` says which one a
folder uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from engine.errors import ModelError
from engine.layers.linear import AWQ_PACK
from engine.models.spec import ModelSpec

_HUGGING_FACE = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
_INTERNLM2 = {
    "embed": "model.tok_embeddings",
    "norm": "model.norm",
    "head": "output",
    "attention_norm": "model.layers.{i}.attention_norm",
    "qkv": "model.layers.{i}.attention.wqkv",
    "o": "model.layers.{i}.attention.wo",
    "mlp_norm": "model.layers.{i}.ffn_norm",
    "gate": "model.layers.{i}.feed_forward.w1",
    "up": "model.layers.{i}.feed_forward.w3",
    "down": "model.layers.{i}.feed_forward.w2",
}
TABLES = {"llama": _HUGGING_FACE, "internlm2": _INTERNLM2}

# Tensors that old exporters wrote and that hold nothing a model needs.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class Layout:
    """The prefixes of one checkpoint; a text-only model has none."""

    nested_text: bool = False  # language_model.model.layers..., language_model.lm_head
    flat_text: bool = False  # model.language_model.layers..., lm_head
    tower: str = ""
    projector: str = ""

    def text(self, name: str) -> str:
        if self.nested_text:
            return f"language_model.{name}"
        if self.flat_text and name.startswith("model."):
            return f"model.language_model.{name.removeprefix('model.')}"
        return name


@dataclass(frozen=True)
class FusedLinear:
    """One linear layer of a block: its input width and its parts as (table key, output width)."""

    name: str  # qkv, o, gate_up, down
    in_features: int
    sources: tuple[tuple[str, int], ...]
    bias: bool


@dataclass(frozen=True)
class Placement:
    """One checkpoint tensor and the slice of a parameter that it fills.

    target is a parameter of `decoder` or `vision`; the tensor's output axis `axis` lands at `start`.
    grouped: that axis holds, per KV head, its query heads, its key head and its value head.
    """

    name: str
    shape: tuple[int, ...]
    target: str
    packed: bool = False  # int32 with eight 4-bit values each; otherwise a float type
    axis: int = 0
    start: int = 0
    grouped: bool = False


def module_name(spec: ModelSpec, key: str, index: int = 0, layout: Layout | None = None) -> str:
    """The checkpoint's module for a table key such as 'q' or 'embed', in layer index."""
    name = TABLES[spec.names][key].format(i=index)
    return name if layout is None else layout.text(name)


def detect_layout(spec: ModelSpec, names: Collection[str]) -> Layout:
    """Which prefixes the tensors called `names` use; LLaVA checkpoints exist in several."""
    if spec.vision is None:
        return Layout()
    flat = Layout(flat_text=True).text(f"{module_name(spec, 'embed')}.weight") in names
    towers = [f"{a}vision_tower.{b}" for a in ("", "model.") for b in ("vision_model.", "")]
    tower = next((p for p in towers if f"{p}embeddings.class_embedding" in names), towers[0])
    projectors = ("multi_modal_projector.", "model.multi_modal_projector.")
    projector = next((p for p in projectors if f"{p}linear_1.weight" in names), projectors[0])
    return Layout(nested_text=not flat, flat_text=flat, tower=tower, projector=projector)


def block_linears(spec: ModelSpec) -> tuple[FusedLinear, ...]:
    """The four linear layers of every block, with what they are fused from."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    qkv = (("q", queries), ("k", keys), ("v", keys))
    if spec.qkv_layout == "grouped":
        qkv = (("qkv", queries + 2 * keys),)
    return (
        FusedLinear("qkv", hidden, qkv, spec.qkv_bias),
        FusedLinear("o", queries, (("o", hidden),), spec.o_bias),
        FusedLinear("gate_up", hidden, (("gate", inner), ("up", inner)), spec.mlp_bias),
        FusedLinear("down", inner, (("down", hidden),), spec.mlp_bias),
    )


def group_size_of(spec: ModelSpec, index: int, fused: str) -> int | None:
    """AWQ rows a group of a linear layer (named as in block_linears); None is not quantized."""
    if spec.quant is None:
        return None
    linear = next(linear for linear in block_linears(spec) if linear.name == fused)
    modules = [module_name(spec, key, index) for key, _ in linear.sources]
    kept = [any(k in m for k in spec.quant.modules_to_not_convert) for m in modules]
    if all(kept):
        return None
    if any(kept):
        raise ModelError(
            f"modules_to_not_convert keeps {modules[kept.index(True)]} in floating point but not "
            f"{modules[kept.index(False)]}; layers that share an input are quantized together or not."
        )
    group_size = spec.quant.group_size
    group_size = linear.in_features if group_size == -1 else group_size
    widths = [width for _, width in linear.sources]
    if spec.qkv_layout == "grouped" and fused == "qkv":
        widths = [spec.head_size]
    if linear.in_features % group_size:
        raise ModelError(
            f"{modules[0]} has {linear.in_features} inputs; AWQ group_size {group_size} must divide them."
        )
    if any(width % AWQ_PACK for width in widths):
        raise ModelError(f"{modules[0]} cannot be AWQ: {AWQ_PACK} output columns share an int32.")
    return group_size


def decoder_placements(spec: ModelSpec, layout: Layout, *, own_head: bool) -> Iterator[Placement]:
    """Every tensor of the text model; own_head False leaves out the head (tied to the embedding)."""
    hidden = spec.hidden_size

    def whole(key: str, target: str, shape: tuple[int, ...], index: int = 0) -> Placement:
        return Placement(f"{module_name(spec, key, index, layout)}.weight", shape, target)

    yield whole("embed", "decoder.embed_weight", (spec.vocab_size, hidden))
    for i in range(spec.num_layers):
        block = f"decoder.layers.{i}"
        yield whole("attention_norm", f"{block}.attention_norm.weight", (hidden,), i)
        yield whole("mlp_norm", f"{block}.mlp_norm.weight", (hidden,), i)
        if spec.qk_norm:
            for key in ("q_norm", "k_norm"):
                yield whole(key, f"{block}.attention.{key}.weight", (spec.head_size,), i)
        for linear in block_linears(spec):
            yield from _linear_placements(spec, layout, linear, i)
    yield whole("norm", "decoder.norm.weight", (hidden,))
    if own_head:
        yield whole("head", "decoder.head.weight", (spec.vocab_size, hidden))


def _linear_placements(
    spec: ModelSpec, layout: Layout, linear: FusedLinear, index: int
) -> Iterator[Placement]:
    owner = "attention" if linear.name in ("qkv", "o") else "mlp"
    target = f"decoder.layers.{index}.{owner}.{linear.name}"
    group_size = group_size_of(spec, index, linear.name)
    start = 0
    for key, width in linear.sources:
        module = module_name(spec, key, index, layout)
        grouped = key == "qkv"
        if group_size is None:
            shape = (width, linear.in_features)
            yield Placement(
                f"{module}.weight", shape, f"{target}.weight", start=start, grouped=grouped
            )
        else:
            groups, rows = linear.in_features // group_size, linear.in_features
            for suffix, length, pack in (
                ("qweight", rows, AWQ_PACK),
                ("qzeros", groups, AWQ_PACK),
                ("scales", groups, 1),
            ):
                yield Placement(
                    f"{module}.{suffix}",
                    (length, width // pack),
                    f"{target}.{suffix}",
                    packed=pack > 1,
                    axis=1,
                    start=start // pack,
                    grouped=grouped,
                )
        if linear.bias:
            yield Placement(
                f"{module}.bias", (width,), f"{target}.bias", start=start, grouped=grouped
            )
        start += width
