"""How much memory a training step takes on a GPU, from the shapes alone, and which batch and checkpointing to take for a card.

Counts what fused.py keeps of a block, what step.py holds beside it, the loss's chunk of logits, and what DeepSpeed's ZeRO 2 keeps of
every number that is learnt; tests hold each count to the code. The peak is that of the worst of four moments: the last block's
forward pass, the loss, the last block's backward pass, the optimizer's update. Imports neither torch nor a model, so that it costs
nothing to ask; knows no device. Valid where the fused passes run in 16 bits with flash attention (sm_80 on). CUDA's own context comes on top, and is named apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.model.architecture import Shape
from train.training.step_sizes import HALVED_MLP_TOKENS, ROW_MULTIPLE, logits_rows, padded

GIB = 2**30
# bytes of a number that is computed with
SIXTEEN = 2

# CUDA's own context, assumed for a small card; 1.29 GiB were outside torch on an H100, NCCL's and the driver's among them
CONTEXT = GIB // 2
# of a card that is left alone
SPARE = 0.02
# rounding and gaps of torch's allocator: measured, so much and a share of the activations
GAPS, GAPS_SHARE = GIB // 4, 1 / 12
# cuBLAS keeps this much a stream on Hopper: the usual one, and the one that captures
WORKSPACE = 2 * (32 << 20)

# bytes of a learnt number: weight and gradient in 16 bits, float32 master and two moments
AT_REST = 2 + 2 + 4 + 8
# while the optimizer works: the gradient in float32, and ZeRO's copy of it
UPDATE = 4 + 4
# while ZeRO takes a gradient over: torch's copy of it, its own, and the sum in float32
HANDOVER = 2 + 2 + 4

# Time, in the measure of one token's. What a micro batch costs however small it is, from the speeds at 512, 2048 and 8192 tokens
BATCH_COSTS = 600
# how much longer a step takes: recomputing is a third of all (1.32 measured, 7B at 1 × 2048); copies beside the computing took 1.3 % more
# on an H100 (7B at 1 × 512), and are assumed to take 5 % where the bus is slower; the rows of an embedding from the host were not measured
TAKES = {"off": 1.0, "on": 4 / 3, "offload": 1.4}
HOST_TAKES = 1.01


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides the memory."""

    batch: int
    length: int
    checkpointing: str  # off | on | offload
    rank: int = 64
    dropout: float = 0.0
    accumulation: int = 1
    graphs: bool = True
    targets: str = "all"
    embedding: str = "device"  # device | host

    @classmethod
    def of(cls, recipe: Recipe) -> "Setting":
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    def choices(self, but: Recipe | None = None) -> dict[str, object]:
        """What is chosen here, by the recipe's keys; without what the recipe `but` says already."""
        values = {key: getattr(self, key) for key in ("batch", "accumulation", "checkpointing", "embedding")}
        return {key: value for key, value in values.items() if but is None or getattr(but, key) != value}

    def words(self) -> str:
        """The same as key=value."""
        return " ".join(f"{key}={value}" for key, value in self.choices().items())

    @property
    def tokens(self) -> int:
        """Of a micro batch, padding included."""
        return self.batch * padded(self.length)

    @property
    def over_the_bus(self) -> bool:
        """Whether a step copies what a card with more memory would keep."""
        return self.checkpointing == "offload" or self.embedding == "host"


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
    rest = {"weights of the blocks": blocks(shape), tables(shape, setting): embeddings(shape, setting)}
    rest |= {"adapters: weights, gradients, AdamW": AT_REST * learnt, "workspace of cuBLAS": WORKSPACE}
    activations = kept(shape, setting)
    between = 4 * learnt if setting.accumulation > 1 else 0  # the sum of gradients so far
    forth, back = forward(shape, setting), backward(shape, setting)
    learning = update(learnt)
    moments = {
        "forward": {"activations": activations, "forward pass": between + forth},
        "loss": {"activations": activations, "loss": between + places(shape, setting) + chunk(shape, setting)},
        "backward": {"activations": activations, "backward pass": between + back},
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


def embeddings(shape: Shape, setting: Setting) -> int:
    """The embedding's table and the head: one where they are the same, or where the embedding's stays on the host."""
    return SIXTEEN * shape.vocabulary * shape.hidden * (1 if shape.tied or setting.embedding == "host" else 2)


def tables(shape: Shape, setting: Setting) -> str:
    return "head" if setting.embedding == "host" and not shape.tied else "embeddings and head"


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
    """What the forward pass leaves on the device for the backward pass: of every block all, with checkpointing its input, and with
    offload the last block's input only; a graph's place of the first block's stays besides."""
    w = Widths.of(shape, setting)
    if setting.checkpointing == "off":
        return SIXTEEN * setting.tokens * shape.layers * w.block
    inputs = shape.layers if setting.checkpointing == "on" else min(shape.layers, 2 if setting.graphs else 1)
    return SIXTEEN * setting.tokens * inputs * w.h


def forward(shape: Shape, setting: Setting) -> int:
    """Beside what is kept, in the widest stage of the last block's forward pass."""
    w = Widths.of(shape, setting)
    return SIXTEEN * max(setting.tokens * wide + weight for wide, weight in made(w, setting))


def made(w: Widths, setting: Setting) -> Iterator[tuple[int, int]]:
    """(numbers a token, numbers of one weight) alive in turn beyond what is kept: what a product reads, with what it gives and its
    weight, or before that with a dropped copy. With checkpointing (fused.Block.passed) also what is kept without: of attention,
    then of the MLP, half the tokens at a time."""
    read, acted = w.h + w.r3, w.i + w.r4
    if setting.checkpointing == "off":
        yield read, read * 2 * w.i
        yield acted + w.h, acted * w.h
        yield acted + w.drop * w.i, 0
        return
    share = 0.5 if setting.tokens >= HALVED_MLP_TOKENS else 1.0
    yield w.h + 2 * w.r1 + w.n, (w.h + w.r1) * w.n
    yield w.attended, w.q * w.h
    yield w.attended - w.h + w.drop * w.q, 0
    yield w.h + int(share * (w.branches + w.r3 + read)), read * 2 * w.i
    yield w.h + int(share * (w.branches + w.r4 + acted + w.h)), acted * w.h
    yield w.h + int(share * (w.branches + w.r4 + acted + w.drop * w.i)), 0


def places(shape: Shape, setting: Setting) -> int:
    """The embeddings or the last norm's input, hidden, and its gradient."""
    return SIXTEEN * setting.tokens * 3 * shape.hidden


def chunk(shape: Shape, setting: Setting) -> int:
    """A chunk of logits with the rows that it is made of and their gradient."""
    rows = min(logits_rows(setting.tokens), setting.tokens)
    return SIXTEEN * rows * (shape.vocabulary + 2 * shape.hidden)


def backward(shape: Shape, setting: Setting) -> int:
    """Beside what is kept and ZeRO's bucket, in the worst stage of the last block's backward pass."""
    w = Widths.of(shape, setting)
    around = w.h * (3 if setting.graphs else 2)  # the last norm's input, its gradient, and the place of its output
    if setting.checkpointing == "offload" and shape.layers > 1:
        around += w.h  # the input that is on its way
    return SIXTEEN * max(setting.tokens * (wide + around) + weight for wide, weight in stages(w, setting))


def stages(w: Widths, setting: Setting) -> Iterator[tuple[int, int]]:
    """(numbers a token, numbers of one weight) alive in turn within fused.Block.backward, beyond what is kept."""
    slopes = w.h + w.back(max(w.r2, w.r4))  # of the block's output; one room for all gradients of that kind
    whole = setting.checkpointing == "off"
    # made again: the first half, then the branches, of half the tokens at a time
    again, mlp = (0, 0) if whole else (w.attended, w.branches + w.r3)
    share = 1.0 if whole or setting.tokens < HALVED_MLP_TOKENS else 0.5
    gone = w.branches if whole else 0  # let go of after the MLP
    yield again + slopes + int(share * (mlp + w.i)), w.i * (w.h + w.back(w.r4))
    yield again + slopes + int(share * (mlp + 2 * w.h)), w.h * w.branches
    yield again + slopes - gone + w.q * (1 + w.drop), w.q * w.h
    yield again + slopes - gone + w.q + w.n + w.back(w.r1) + 2 * w.heads, 0
    yield again + slopes - gone - w.q + w.back(w.r1) + 2 * w.h, w.h * w.n


def update(learnt: int) -> int:
    """Gradients in wider types than they are kept in, while ZeRO takes them over or the optimizer works."""
    return max(UPDATE, HANDOVER) * learnt


# What it takes of the host


def on_host(shape: Shape, setting: Setting) -> int:
    """Bytes of the machine's memory that a step keeps for the card: the embedding's table, and pinned room for the inputs of blocks,
    of which torch takes powers of two."""
    table = SIXTEEN * shape.vocabulary * shape.hidden if setting.embedding == "host" and not shape.tied else 0
    room = SIXTEEN * setting.tokens * shape.hidden * (shape.layers - 1) if setting.checkpointing == "offload" else 0
    return table + (1 << (room - 1).bit_length() if room else 0)


# For a card


def candidates(shape: Shape, recipe: Recipe) -> Iterator[tuple[Setting, Estimate]]:
    """Every way to compute the recipe's step of batch × accumulation rows, quickest first.

    Those that copy over the bus come after all that do not: what they cost depends on the machine around the card. An embedding that
    the recipe wants on the host stays there in all of them.
    """
    rows, base = recipe.batch * recipe.accumulation, Setting.of(recipe)
    places = (base.embedding,) if shape.tied or base.embedding == "host" else ("device", "host")
    found = [
        replace(base, batch=batch, accumulation=rows // batch, checkpointing=how, embedding=place)
        for batch in range(1, rows + 1)
        if rows % batch == 0
        for how in TAKES
        for place in places
    ]
    for setting in sorted(found, key=lambda setting: (setting.over_the_bus, seconds(setting))):
        yield setting, estimate(shape, setting)


def seconds(setting: Setting) -> float:
    """The time of a step in the measure of one token's, to order settings by."""
    place = HOST_TAKES if setting.embedding == "host" else 1.0
    return setting.accumulation * (setting.tokens + BATCH_COSTS) * TAKES[setting.checkpointing] * place


def choose(shape: Shape, recipe: Recipe, card: int) -> tuple[Setting, Estimate] | None:
    """The quickest way that fits a card of `card` bytes; None if none does."""
    return next(((s, e) for s, e in candidates(shape, recipe) if fits(e, card)), None)


def fits(found: Estimate, card: int) -> bool:
    return found.with_context <= card * (1 - SPARE)


def longest(shape: Shape, setting: Setting, card: int) -> int:
    """The longest rows, in steps of 64 tokens, that fit a card one at a time in a setting that is otherwise this; 0 if none do."""
    one = replace(setting, batch=1, accumulation=setting.batch * setting.accumulation)
    low, high = 0, 1 << 20
    while high - low > ROW_MULTIPLE:
        middle = (low + high) // 2 // ROW_MULTIPLE * ROW_MULTIPLE
        low, high = (middle, high) if fits(estimate(shape, replace(one, length=middle)), card) else (low, middle)
    return low
