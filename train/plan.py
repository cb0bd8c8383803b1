"""How much memory a training step takes on a GPU, from the shapes alone, and which batch and checkpointing to take for a card.

Counts what fused.py keeps of a block, what step.py holds beside it, the loss's chunk of logits, and what DeepSpeed's ZeRO 2 keeps of
every number that is learnt; tests hold each count to the code. The peak is that of the worst of four moments: the last block's
forward pass, the loss, the last block's backward pass, the optimizer's update. Imports neither torch nor a model, so that it costs nothing to ask; knows no device.
Valid where the fused passes run in 16 bits with flash attention (sm_80 on). CUDA's own context comes on top, and is named apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from train.config import Recipe
from train.errors import UserError

GIB = 2**30
SIXTEEN = 2  # bytes of a number that is computed with
CONTEXT = (
    GIB // 2
)  # of CUDA itself, assumed for a small card; 1.29 GiB were outside torch on an H100, NCCL's and the driver's among them
SPARE = 0.02  # of a card that is left alone
GAPS, GAPS_SHARE = (
    GIB // 4,
    1 / 12,
)  # rounding and gaps of torch's allocator: measured, so much and a share of the activations
ROUND = 64  # rows are padded to a multiple of this many tokens (step.WIDTH)
LOSS_ROWS, LOSS_TOKENS = 1024, 4096  # rows of logits at once, half as many up to so many tokens (step.chunk_of)
HALVES = 4096  # tokens from which checkpointing makes the MLP again in two halves (fused.HALVES)
WORKSPACE = 2 * (32 << 20)  # cuBLAS keeps this much a stream on Hopper: the usual one, and the one that captures
BUCKET = 50_000_000  # numbers in ZeRO's reduction bucket (deepspeed/zero2.json), there during the backward pass
# bytes of a learnt number: weight and gradient in 16 bits, float32 master and two moments
AT_REST = 2 + 2 + 4 + 8
UPDATE = 4 + 8  # while the optimizer works: the gradient in float32, and in float64 for its norm
HANDOVER = 2 + 2 + 4  # while ZeRO takes a gradient over: torch's copy of it, its own, and the sum in float32


@dataclass(frozen=True)
class Shape:
    """A model as far as memory is concerned."""

    layout: str  # qwen (fused c_attn) | qwen2
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int  # width of one branch of the MLP
    vocabulary: int
    tied: bool = False
    bits: int = 4  # of a weight in the blocks; 16: floats
    group: int = 128  # weights of one scale

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.key_heads) * self.head_size

    def groups(self) -> list[list[str]]:
        """The linears that read the same input, by name."""
        names = [name for name, _, _ in self.linears()]
        return [names[:-4], names[-4:-3], names[-3:-1], names[-1:]]

    def linears(self) -> list[tuple[str, int, int]]:
        """(name, K, N) of the linears of a block, named as the layout does."""
        h, q, kv, i = self.hidden, self.queries, self.key_heads * self.head_size, self.inner
        if self.layout == "qwen":
            return [("c_attn", h, self.qkv), ("c_proj", q, h), ("w2", h, i), ("w1", h, i), ("c_proj", i, h)]
        attention = [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
        return [*attention, ("gate_proj", h, i), ("up_proj", h, i), ("down_proj", i, h)]


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides the memory."""

    batch: int
    length: int
    checkpointing: bool
    rank: int = 64
    dropout: float = 0.0
    accumulation: int = 1
    graphs: bool = True
    targets: str = "all"

    @classmethod
    def of(cls, recipe: Recipe) -> "Setting":
        same = ("batch", "length", "checkpointing", "rank", "dropout", "accumulation", "graphs", "targets")
        return cls(**{name: getattr(recipe, name) for name in same})

    @property
    def tokens(self) -> int:
        """Of a micro batch, padding included."""
        return self.batch * (-(-self.length // ROUND) * ROUND)


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, at the moment of the peak; `context` is not among them.

    `held` is what torch takes from the card: gaps between blocks, and captured graphs keep the room of their activations also while
    the update works.
    """

    parts: dict[str, int]
    moment: str
    at_rest: int
    held: int

    @property
    def peak(self) -> int:
        """All that is allocated at the worst moment."""
        return sum(self.parts.values())

    @property
    def with_context(self) -> int:
        """What the card must have."""
        return self.held + CONTEXT


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """What one step takes at its worst moment."""
    learnt = numbers(shape, setting)
    rest = {"weights of the blocks": blocks(shape), "embeddings and head": embeddings(shape)}
    rest |= {"adapters: weights, gradients, AdamW": AT_REST * learnt, "workspace of cuBLAS": WORKSPACE}
    activations = kept(shape, setting)
    between = 4 * learnt if setting.accumulation > 1 else 0  # the sum of gradients so far
    forth, back = forward(shape, setting), backward(shape, setting)
    learning = update(learnt)
    moments = {
        "forward": {"activations": activations, "forward pass": between + forth},
        "loss": {"activations": activations, "loss": between + places(shape, setting) + chunk(shape, setting)},
        "backward": {"activations": activations, "backward pass": between + back + SIXTEEN * BUCKET},
        "update": {"gradients during the update": (places(shape, setting) if setting.graphs else 0) + learning},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    at_rest, peak = sum(rest.values()), sum(moments[moment].values())
    captured = activations + max(forth, back) + between + max(chunk(shape, setting), learning)
    held = at_rest + (max(peak, captured) if setting.graphs else peak) + GAPS + int(GAPS_SHARE * activations)
    return Estimate({**rest, **moments[moment]}, moment, at_rest, held)


# What is always there


def blocks(shape: Shape) -> int:
    """The frozen linears: codes, a scale and a zero a group, the group of each row; norms."""
    total = 0
    for _, k, n in shape.linears():
        if shape.bits == 16:
            total += SIXTEEN * k * n
        else:
            groups = k // shape.group
            total += k * n * shape.bits // 8 + groups * n * 2 + groups * n * shape.bits // 8 + 4 * k
    return shape.layers * (total + SIXTEEN * (2 * shape.hidden + shape.qkv))


def embeddings(shape: Shape) -> int:
    return SIXTEEN * shape.vocabulary * shape.hidden * (1 if shape.tied else 2)


def numbers(shape: Shape, setting: Setting) -> int:
    """How many are learnt: A [r, K] and B [N, r] of every target."""
    return shape.layers * sum(setting.rank * (k + n) for _, k, n in adapted(shape, setting.targets))


def adapted(shape: Shape, targets: str) -> list[tuple[str, int, int]]:
    """The linears of a block that have an adapter.

    Raises:
        UserError: a name that no linear has.
    """
    known = shape.linears()
    wanted = {name.strip() for name in targets.split(",")} if targets != "all" else {name for name, _, _ in known}
    if strange := wanted - {name for name, _, _ in known}:
        there = ", ".join(dict.fromkeys(name for name, _, _ in known))
        raise UserError(f"targets={targets}: no linear is called {', '.join(sorted(strange))}. There are: {there}.")
    return [linear for linear in known if linear[0] in wanted]


# What a micro batch adds


@dataclass(frozen=True)
class Widths:
    """Numbers a token of what the passes hold of one block: h hidden, q queries, n queries, keys and values, i inner; and of the
    adapters' thin products, by projection: 1 qkv, 2 out, 3 gate and up, 4 down."""

    h: int
    q: int
    n: int
    i: int
    heads: int
    r1: int
    r2: int
    r3: int
    r4: int
    drop: int  # 1 where dropout makes a copy of what an adapter reads, else 0

    @classmethod
    def of(cls, shape: Shape, setting: Setting) -> "Widths":
        targets = [name for name, _, _ in adapted(shape, setting.targets)]
        r1, r2, r3, r4 = (setting.rank * sum(name in targets for name in group) for group in shape.groups())
        sizes = (shape.hidden, shape.queries, shape.qkv, shape.inner, shape.heads)
        return cls(*sizes, r1, r2, r3, r4, drop=1 if setting.dropout else 0)

    def back(self, rank: int) -> int:
        """Columns that a gradient has to spare for the adapters' part: none with dropout."""
        return 0 if self.drop else rank

    @property
    def attended(self) -> int:
        """What the first half of a block keeps beside its input: q, k, v, attention's output and log-sums (32 bits), the residual."""
        return self.n + self.q + 2 * self.heads + self.h + self.r1 + self.r2

    @property
    def branches(self) -> int:
        """Gate and up, with room for the gradient's adapters."""
        return 2 * self.i + self.back(self.r3)

    @property
    def block(self) -> int:
        """All that is kept of a block."""
        return self.h + self.attended + self.branches + self.r3 + self.r4


def kept(shape: Shape, setting: Setting) -> int:
    """What the forward pass leaves for the backward pass: of every block all, or with checkpointing its input."""
    w = Widths.of(shape, setting)
    return SIXTEEN * setting.tokens * shape.layers * (w.h if setting.checkpointing else w.block)


def forward(shape: Shape, setting: Setting) -> int:
    """Beside what is kept, in the last block's MLP: what it read, its product, a weight as floats."""
    w = Widths.of(shape, setting)
    again = w.block - w.h if setting.checkpointing else 0
    made = max(
        (w.h + w.r3, (w.h + w.r3) * 2 * w.i),
        (w.i + w.r4 + max(w.h, 2 * w.drop * w.i), (w.i + w.r4) * w.h),
        key=lambda pair: pair[0],
    )
    return SIXTEEN * (setting.tokens * (again + made[0]) + made[1])


def places(shape: Shape, setting: Setting) -> int:
    """The embeddings or the last norm's input, hidden, and its gradient."""
    return SIXTEEN * setting.tokens * 3 * shape.hidden


def chunk(shape: Shape, setting: Setting) -> int:
    """A chunk of logits with the rows that it is made of and their gradient."""
    rows = min(LOSS_ROWS if setting.tokens > LOSS_TOKENS else LOSS_ROWS // 2, setting.tokens)
    return SIXTEEN * rows * (shape.vocabulary + 2 * shape.hidden)


def backward(shape: Shape, setting: Setting) -> int:
    """Beside what is kept and ZeRO's bucket, in the worst stage of the last block's backward pass."""
    w = Widths.of(shape, setting)
    around = w.h * (3 if setting.graphs else 2)  # the last norm's input, its gradient, and the place of its output
    return SIXTEEN * max(setting.tokens * (wide + around) + weight for wide, weight in stages(w, setting))


def stages(w: Widths, setting: Setting) -> Iterator[tuple[int, int]]:
    """(numbers a token, numbers of one weight) alive in turn within fused.Block.backward, beyond what is kept."""
    slopes = w.h + w.back(max(w.r2, w.r4))  # of the block's output; one room for all gradients of that kind
    again, share = 0, 1.0
    if setting.checkpointing:  # made again: the first half, then the branches, of half the tokens at a time
        again, share = w.attended, 0.5 if setting.tokens >= HALVES else 1.0
    mlp = (w.branches + w.r3) if setting.checkpointing else 0
    gone = 0 if setting.checkpointing else w.branches  # let go of after the MLP
    yield again + slopes + int(share * (mlp + w.i * (1 + w.drop))), w.i * (w.h + w.back(w.r4))
    yield again + slopes + int(share * (mlp + w.h * (2 + w.drop))), w.h * w.branches
    yield again + slopes - gone + w.q * (1 + w.drop), w.q * w.h
    yield again + slopes - gone + w.q + w.n + w.back(w.r1) + 2 * w.heads, 0
    yield again + slopes - gone - w.q + w.n + w.back(w.r1) + w.h * (2 + w.drop), w.h * w.n


def update(learnt: int) -> int:
    """Gradients in wider types than they are kept in, while ZeRO takes them over or the optimizer works."""
    return max(UPDATE * learnt, HANDOVER * learnt + SIXTEEN * BUCKET)


# For a card


def candidates(shape: Shape, recipe: Recipe) -> Iterator[tuple[Setting, Estimate]]:
    """Every way to compute the recipe's step of batch × accumulation rows, quickest first."""
    rows, base = recipe.batch * recipe.accumulation, Setting.of(recipe)
    found = []
    for batch in (b for b in range(1, rows + 1) if rows % b == 0):
        for checkpointing in (False, True):
            found.append(replace(base, batch=batch, accumulation=rows // batch, checkpointing=checkpointing))
    for setting in sorted(found, key=seconds):
        yield setting, estimate(shape, setting)


def seconds(setting: Setting) -> float:
    """The time of a step in the measure of one token's, to order settings by: what a micro batch costs however small it is is
    about 600 tokens' worth (from the speeds at 512, 2048 and 8192 tokens), and recomputing a third of all."""
    return setting.accumulation * (setting.tokens + 600) * (4 / 3 if setting.checkpointing else 1)


def choose(shape: Shape, recipe: Recipe, card: int) -> tuple[Setting, Estimate] | None:
    """The quickest way that fits a card of `card` bytes; None if none does."""
    return next(((s, e) for s, e in candidates(shape, recipe) if fits(e, card)), None)


def fits(found: Estimate, card: int) -> bool:
    return found.with_context <= card * (1 - SPARE)


def longest(shape: Shape, recipe: Recipe, card: int) -> int:
    """The longest rows, in steps of 64 tokens, that fit a card one at a time with checkpointing; 0 if none do."""
    base = replace(Setting.of(recipe), batch=1, accumulation=recipe.batch * recipe.accumulation, checkpointing=True)
    low, high = 0, 1 << 20
    while high - low > ROUND:
        middle = (low + high) // 2 // ROUND * ROUND
        low, high = (middle, high) if fits(estimate(shape, replace(base, length=middle)), card) else (low, middle)
    return low


def card_bytes(text: str) -> int:
    """ "8G", "8GB", "7.6 GiB" or "8192M" -> bytes; makers' gigabytes are binary ones.

    Raises:
        UserError: no size.
    """
    word = text.strip().lower().removesuffix("b").removesuffix("i").strip()
    unit = {"g": GIB, "m": 2**20}.get(word[-1:], 0)
    try:
        size = float(word[:-1] if unit else word) * (unit or GIB)
    except ValueError:
        size = 0.0
    if not 0 < size < 2**50:
        raise UserError(f"gpu={text}: expected the memory of a card, as 8G or 7.6G; empty: this machine's card.")
    return int(size)


# Which model


PUBLISHED: dict[str, Shape] = {  # by the last part of a name, before -Chat, -Instruct, -Int4 …
    "Qwen-1_8B": Shape("qwen", 24, 2048, 16, 16, 128, 5504, 151_936),
    "Qwen-7B": Shape("qwen", 32, 4096, 32, 32, 128, 11_008, 151_936),
    "Qwen-14B": Shape("qwen", 40, 5120, 40, 40, 128, 13_696, 152_064),
    "Qwen-72B": Shape("qwen", 80, 8192, 64, 64, 128, 24_576, 152_064),
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, tied=True),
    "Qwen2.5-1.5B": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, tied=True),
    "Qwen2.5-3B": Shape("qwen2", 36, 2048, 16, 2, 128, 11_008, 151_936, tied=True),
    "Qwen2.5-7B": Shape("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064),
    "Qwen2.5-14B": Shape("qwen2", 48, 5120, 40, 8, 128, 13_824, 152_064),
    "Qwen2.5-32B": Shape("qwen2", 64, 5120, 40, 8, 128, 27_648, 152_064),
    "Qwen2.5-72B": Shape("qwen2", 80, 8192, 64, 8, 128, 29_568, 152_064),
}


def published(name: str) -> Shape:
    """The shape of a model that is not here, by its name: Qwen/Qwen-7B-Chat-Int4, Qwen2.5-7B-Instruct-GPTQ-Int4.

    Raises:
        UserError: a name that is none of those known.
    """
    last = name.rstrip("/").rpartition("/")[2].replace("-Coder", "")
    found = max((key for key in PUBLISHED if last == key or last.startswith(f"{key}-")), key=len, default=None)
    if found is None:
        raise UserError(
            f"model {name!r}: no folder of that name, and no shape that is known by it. Known: {', '.join(PUBLISHED)}; "
            f"or fetch it first: make model MODEL={name}"
        )
    bits = 4 if "Int4" in last else 8 if "Int8" in last else 16
    return replace(PUBLISHED[found], bits=bits)


def read_shape(config: dict[str, Any]) -> Shape:
    """From the content of a published config.json.

    Raises:
        UserError: neither Qwen-1 nor Qwen2.
    """
    kind = config.get("model_type")
    if kind not in ("qwen", "qwen2"):
        raise UserError(f"config.json: model_type is {kind!r}; this program reads 'qwen' and 'qwen2'.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    packing = config.get("quantization_config") or {}
    group = packing.get("group_size", 128)
    return Shape(
        layout=kind,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        key_heads=heads if kind == "qwen" else config.get("num_key_value_heads", heads),
        head_size=config.get("kv_channels", 128) if kind == "qwen" else config.get("head_dim") or hidden // heads,
        inner=config["intermediate_size"] // (2 if kind == "qwen" else 1),
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        bits=packing.get("bits", 4) if packing else 16,
        group=group if group > 0 else hidden,
    )
