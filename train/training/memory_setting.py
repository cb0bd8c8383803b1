"""What decides the memory of a training step: the keys of a recipe, and the widths of the tensors that follow from them."""

from dataclasses import dataclass, fields

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.model.architecture import Shape
from train.training.step_sizes import padded

FP8_VALUES = 0.5  # of a value in fp8, in units of one in 16 bits


@dataclass(frozen=True)
class Setting:
    """The keys of a recipe that decide the memory of a step."""

    batch: int
    length: int
    checkpointing: str  # off | on | offload
    rank: int = 64
    dropout: float = 0.0
    accumulation: int = 1
    graphs: bool = True
    targets: str = "all"
    embedding: str = "device"  # device | host
    lora_plus: float = 1.0
    shares: int = 1
    start: str = "random"
    loss: str = "sft"  # dpo: a row holds pairs of two sequences of that length
    method: str = "lora"
    precision: str = "auto"  # of it counts whether it is fp8
    shards: int = 1  # processes that share the optimizer's state out among them; counted with method=full

    @classmethod
    def of(cls, recipe: Recipe, shards: int = 1) -> "Setting":
        keys = [field.name for field in fields(cls) if field.name != "shards"]
        return cls(**{key: getattr(recipe, key) for key in keys}, shards=shards)

    def overrides(self, over: Recipe | None = None) -> dict[str, object]:
        """The keys that a plan chooses, with their values; with `over` only those in which that recipe differs."""
        values = {key: getattr(self, key) for key in ("batch", "accumulation", "checkpointing", "embedding")}
        return {key: value for key, value in values.items() if over is None or getattr(over, key) != value}

    def as_text(self) -> str:
        """`overrides` as key=value words."""
        return " ".join(f"{key}={value}" for key, value in self.overrides().items())

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch, padding included."""
        return self.batch * padded(2 * self.length if self.loss == "dpo" else self.length)

    @property
    def fp8(self) -> float:
        """FP8_VALUES where the products read copies of their factors in fp8, else 0: copies in units of 16 bits."""
        return FP8_VALUES if self.precision == "fp8" else 0.0

    @property
    def over_the_bus(self) -> bool:
        """Whether a step copies data between host and card that a larger card would keep."""
        return self.checkpointing == "offload" or self.embedding == "host"


def adapted_linears(shape: Shape, targets: str) -> list[tuple[str, int, int]]:
    """(name, K, N) of the linears of a block that have an adapter.

    Raises:
        UserError: a target that is the name of no linear.
    """
    linears = shape.linears()
    wanted = {name.strip() for name in targets.split(",")} if targets != "all" else {name for name, _, _ in linears}
    if unknown := wanted - {name for name, _, _ in linears}:
        known = ", ".join(dict.fromkeys(name for name, _, _ in linears))
        raise UserError(f"targets={targets}: no linear is called {', '.join(sorted(unknown))}. There are: {known}.")
    return [linear for linear in linears if linear[0] in wanted]


@dataclass(frozen=True)
class Widths:
    """Values per token of the tensors of one block. rank_*: columns of the low-rank product x·Aᵀ of a fused linear."""

    hidden: int
    queries: int
    qkv: int  # queries, keys and values together
    inner: int
    heads: int
    rank_qkv: int
    rank_out: int
    rank_gate_up: int
    rank_down: int
    normed_heads: int  # q and k before a norm of each head; 0 where the layout has no such norms
    dropout: int  # 1 where dropout copies the input of an adapter, else 0
    fp8: float  # 0.5 where a product's factors are copied in fp8, else 0
    extra_columns: bool  # whether gradients have extra columns for the adapters

    @classmethod
    def of(cls, shape: Shape, setting: Setting) -> "Widths":
        targets = [name for name, _, _ in adapted_linears(shape, setting.targets)]
        qkv, out, gate_up, down = (setting.rank * sum(name in targets for name in group) for group in shape.groups())
        sizes = (shape.hidden, shape.queries, shape.qkv, shape.inner, shape.heads)
        ranks, dropout = (qkv, out, gate_up, down), 1 if setting.dropout else 0
        extra_columns = not setting.dropout and not setting.fp8
        return cls(*sizes, *ranks, shape.normed_heads, dropout, setting.fp8, extra_columns)

    def extra(self, rank: int) -> int:
        """Extra columns of a gradient for the adapter's part; with dropout there are none, and with fp8."""
        return rank if self.extra_columns else 0

    @property
    def attention(self) -> int:
        """What attention saves beside its input: q, k, v, output, log-sums in 32 bits, residual, low-rank products.

        Where the heads of q and k are normed, also q and k before that.
        """
        return (
            self.qkv + self.normed_heads + self.queries + 2 * self.heads + self.hidden + self.rank_qkv + self.rank_out
        )

    @property
    def gate_up(self) -> int:
        """Gate and up, with the extra columns of their gradient."""
        return 2 * self.inner + self.extra(self.rank_gate_up)

    @property
    def gate_up_input(self) -> int:
        return self.hidden + (0 if self.fp8 else self.rank_gate_up)

    @property
    def down_input(self) -> int:
        return self.inner + (0 if self.fp8 else self.rank_down)

    @property
    def block(self) -> int:
        """All that a block saves without checkpointing."""
        return self.hidden + self.attention + self.gate_up + self.rank_gate_up + self.rank_down
