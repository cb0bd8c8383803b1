"""The memory that a training step takes on a GPU, from the shapes alone. memory_plan.py chooses what fits a card.

Counts what fused_decoder.py saves of a block, what graph_step.py holds beside it, the loss's chunk of logits, and what
DeepSpeed's ZeRO 2 keeps of every trainable parameter; tests compare each count with the code. The peak is the largest
of the named stages of a step: those of the last block's forward pass, the loss, those of the last block's backward
pass, and the optimizer's update. Imports neither torch nor a model, so that asking costs nothing, and knows no device.
Valid for the fused passes in 16 bits with flash attention (compute capability 8.0 or newer). CUDA's own context is not
part of the count: it is named separately.
"""

from dataclasses import dataclass, replace

from train.model.architecture import Shape
from train.training.memory_setting import Setting, Widths, adapted_linears
from train.training.step_sizes import HALVED_MLP_TOKENS, forward_in_fp8, logits_rows

GIB = 2**30
BYTES_16 = 2  # of a value in float16 or bfloat16, in which the passes compute
# CUDA's own context, assumed for a small card. On an H100, 1.29 GiB were outside torch, NCCL's and the driver's memory
# included
CONTEXT = GIB // 2
# what torch's allocator loses to rounding and gaps, measured: a constant, and a share of the activations
ALLOCATOR_GAPS, ALLOCATOR_GAPS_SHARE = GIB // 4, 1 / 12
# cuBLAS's workspaces on Hopper: one for the usual stream, one for the stream that captures graphs
CUBLAS_WORKSPACES = 2 * (32 << 20)

# Bytes of a trainable parameter
ADAPTER_BYTES = 2 + 2 + 4 + 8  # weight and gradient in 16 bits, float32 master, AdamW's two moments
START_BYTES = 2  # the values that A and B began with, where they began with a part of the base
LORA_PLUS_BYTES = 4  # the factor of each update, and as much again during the update: the values before it
REFERENCE_BYTES = 2  # the values that are trained, while the vector has those of DPO's reference
UPDATE_BYTES = 4 + 4  # during the optimizer's update: the gradient in float32, and ZeRO's copy of it
REDUCE_BYTES = 2 + 2 + 4  # while ZeRO takes a gradient over: torch's copy, its own, and the sum in float32


@dataclass(frozen=True)
class Estimate:
    """Bytes of one step.

    parts: what is allocated at the peak, by name. stages: all that is allocated at each stage of the step, by its name.
    phase: of the
    peak: forward, loss, backward or update. at_rest: what stays between steps. held: what torch takes from the card,
    which adds the gaps between its blocks, and the activations that captured graphs hold during the update too. CUDA's
    context is in none of these.
    """

    parts: dict[str, int]
    stages: dict[str, int]
    phase: str
    at_rest: int
    held: int

    @property
    def peak(self) -> int:
        """All that is allocated at the peak."""
        return sum(self.parts.values())

    @property
    def with_context(self) -> int:
        """What the card must have."""
        return self.held + CONTEXT


@dataclass(frozen=True)
class Stage:
    """One moment of a pass: what is allocated then beside the saved activations."""

    name: str
    values_per_token: float
    weight_values: float = 0  # of the one weight that is dequantised at that moment

    def bytes(self, tokens: int) -> int:
        return int(BYTES_16 * (tokens * self.values_per_token + self.weight_values))


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """What one step takes at its peak."""
    constant = constant_parts(shape, setting)
    stages = stage_parts(shape, setting)
    peak = max(stages, key=lambda name: sum(stages[name].values()))
    at_rest = sum(constant.values())
    totals = {name: at_rest + sum(parts.values()) for name, parts in stages.items()}
    held = totals[peak]
    if setting.graphs:
        held = max(held, at_rest + captured_bytes(shape, setting))
    held += ALLOCATOR_GAPS + int(ALLOCATOR_GAPS_SHARE * saved_bytes(shape, setting))
    return Estimate({**constant, **stages[peak]}, totals, peak.partition(":")[0], at_rest, held)


def constant_parts(shape: Shape, setting: Setting) -> dict[str, int]:
    """What is allocated all the time, by name."""
    return {
        "weights of the blocks": block_weight_bytes(shape),
        embedding_name(shape, setting): embedding_bytes(shape, setting),
        "adapters: weights, gradients, AdamW": adapter_bytes(setting) * adapter_parameters(shape, setting),
        "cuBLAS workspaces": CUBLAS_WORKSPACES,
    }


def stage_parts(shape: Shape, setting: Setting) -> dict[str, dict[str, int]]:
    """What each stage of a step adds to the constant parts: "PHASE: STAGE" -> name -> bytes."""
    saved, tokens = {"saved activations": saved_bytes(shape, setting)}, setting.tokens
    summed = summed_gradient_bytes(shape, setting)
    hidden = hidden_bytes(shape, setting)
    stages: dict[str, dict[str, int]] = {}
    for phase, its_stages in (
        ("forward", forward_stages(shape, setting)),
        ("backward", backward_stages(shape, setting)),
    ):
        for stage in its_stages:
            stages[f"{phase}: {stage.name}"] = {**saved, f"{phase} pass": summed + stage.bytes(tokens)}
        if phase == "forward":
            stages["loss"] = {**saved, "loss": summed + hidden + logits_bytes(shape, setting)}
    if setting.loss == "dpo":  # its forward pass and its losses, while the adapter has the values before training
        kept = {
            **saved,
            "the adapter, while the reference computes": REFERENCE_BYTES * adapter_parameters(shape, setting),
        }
        passes = max(largest(forward_stages(shape, setting), setting), hidden + logits_bytes(shape, setting))
        stages["forward: the reference"] = {**kept, "forward pass": summed + passes}
    kept_by_graphs = hidden if setting.graphs else 0
    stages["update"] = {"gradients during the update": kept_by_graphs + update_bytes(shape, setting)}
    return stages


# --- what is always there


def block_weight_bytes(shape: Shape) -> int:
    """The frozen linears of all blocks, their biases, and the norms."""
    total = sum(BYTES_16 * k * n if shape.bits == 16 else shape.packed_bytes(k, n) for _, k, n in shape.linears())
    return shape.layers * (total + BYTES_16 * shape.vectors)


def embedding_bytes(shape: Shape, setting: Setting) -> int:
    """The embedding and the head on the card; one matrix where they are tied, or where the embedding is on the host."""
    return BYTES_16 * shape.vocabulary * shape.hidden * (1 if shape.tied or setting.embedding == "host" else 2)


def embedding_name(shape: Shape, setting: Setting) -> str:
    return "head" if setting.embedding == "host" and not shape.tied else "embeddings and head"


def adapter_parameters(shape: Shape, setting: Setting) -> int:
    """Trainable parameters: A [r, K] and B [N, r] of every target."""
    return shape.layers * sum(setting.rank * (k + n) for _, k, n in adapted_linears(shape, setting.targets))


# --- what a micro batch adds


def saved_bytes(shape: Shape, setting: Setting) -> int:
    """What the forward pass saves on the card for the backward pass.

    Without checkpointing everything of every block; with it the input of each block; with offload the input of the last
    block only, and with graphs that of the first, whose memory the graph keeps.
    """
    w = Widths.of(shape, setting)
    if setting.checkpointing == "off":
        return BYTES_16 * setting.tokens * shape.layers * w.block
    inputs = shape.layers if setting.checkpointing == "on" else min(shape.layers, 2 if setting.graphs else 1)
    return BYTES_16 * setting.tokens * inputs * w.hidden


def forward_stages(shape: Shape, setting: Setting) -> list[Stage]:
    """The stages of the last block's forward pass, and of the last one in fp8: the end blocks' stays in 16 bits."""
    w = Widths.of(shape, setting)
    found = _forward_stages(setting, replace(w, fp8=0))
    if not w.fp8 or not (in_fp8 := forward_in_fp8(shape.layers)):
        return found
    after = shape.layers - in_fp8.stop  # blocks that have saved nothing then
    less = after * {"off": w.block, "on": w.hidden, "offload": 0}[setting.checkpointing]
    rounded = _forward_stages(setting, w)
    return found + [Stage(f"{one.name}, in fp8", one.values_per_token - less, one.weight_values) for one in rounded]


def _forward_stages(setting: Setting, w: Widths) -> list[Stage]:
    """The stages of a block's forward pass.

    Each is a product with its input, output and weight, or the input of one with its copy for dropout.

    With checkpointing (fused_decoder.py) the tensors count too that are saved without it: of attention, then of the
    MLP, which takes half of the tokens at a time where they are many.
    """
    weight, copied = 1 + w.fp8, 1 + w.fp8  # of a product: its weight and its input, with their copies in fp8
    if setting.checkpointing == "off":
        return [
            Stage("gate and up product", copied * w.gate_up_input, weight * w.gate_up_input * 2 * w.inner),
            Stage("down product", copied * w.down_input + w.hidden, weight * w.down_input * w.hidden),
            Stage("SwiGLU", copied * w.down_input + w.dropout * w.inner),
        ]
    share = 0.5 if setting.tokens >= HALVED_MLP_TOKENS else 1.0
    mlp = w.gate_up + w.rank_down + copied * w.down_input
    gate_up_input = copied * w.gate_up_input
    ranks_qkv = (1 if w.fp8 else 2) * w.rank_qkv
    return [
        Stage("q, k and v product", copied * w.hidden + ranks_qkv + w.qkv, weight * (w.hidden + w.rank_qkv) * w.qkv),
        Stage("attention's output projection", w.attention + w.fp8 * w.queries, weight * w.queries * w.hidden),
        Stage("attention", w.attention - w.hidden + w.dropout * w.queries),
        Stage(
            "gate and up product",
            w.hidden + share * (w.gate_up + w.rank_gate_up + gate_up_input),
            weight * w.gate_up_input * 2 * w.inner,
        ),
        Stage("down product", w.hidden + share * (mlp + w.hidden), weight * w.down_input * w.hidden),
        Stage("SwiGLU", w.hidden + share * (mlp + w.dropout * w.inner)),
    ]


def backward_stages(shape: Shape, setting: Setting) -> list[Stage]:
    """The stages of the last block's backward pass, whose gradients of the block's output share one buffer."""
    w, checkpointed = Widths.of(shape, setting), setting.checkpointing != "off"
    share = 0.5 if checkpointed and setting.tokens >= HALVED_MLP_TOKENS else 1.0
    around: float = w.hidden * (
        3 if setting.graphs else 2
    )  # the last norm's input, its gradient, and with graphs its output
    if setting.checkpointing == "offload" and shape.layers > 1:
        around += w.hidden  # the input of the block before, which is being copied
    # the gradient of the block's output, and its copy in fp8
    around += (1 + w.fp8) * w.hidden + w.extra(max(w.rank_out, w.rank_down))
    recomputed = w.attention if checkpointed else 0
    recomputed_mlp = w.gate_up + w.rank_gate_up if checkpointed else 0
    after_mlp = around + recomputed - (0 if checkpointed else w.gate_up)  # gate and up are freed after the MLP
    around += recomputed
    extra_qkv, weight = w.extra(w.rank_qkv), 1 + w.fp8
    return [
        Stage(
            "gradient of down's input",
            around + share * (recomputed_mlp + w.inner),
            weight * w.inner * (w.hidden + w.extra(w.rank_down)),
        ),
        Stage("gradients of gate and up", around + share * (recomputed_mlp + (1 + 2 * w.fp8) * w.inner)),
        Stage(
            "gradient of the MLP's input",
            around + share * (recomputed_mlp + (0 if w.fp8 else 2 * w.hidden) + w.fp8 * 2 * w.inner),
            weight * w.hidden * w.gate_up,  # in fp8 the product begins when its weight in 16 bits is gone
        ),
        Stage("norm of the MLP's input", around + share * (recomputed_mlp + 2 * w.hidden)),
        Stage("gradient of attention's output", after_mlp + w.queries * (1 + w.dropout), weight * w.queries * w.hidden),
        Stage("gradients of q, k and v", after_mlp + w.queries + w.qkv + extra_qkv + 2 * w.heads),
        Stage(
            "gradient of attention's input",
            after_mlp - w.queries - w.normed_heads + extra_qkv + 2 * w.hidden + w.fp8 * w.qkv,
            weight * w.hidden * w.qkv,
        ),
    ]


def largest(stages: list[Stage], setting: Setting) -> int:
    """Bytes of the largest of several stages."""
    return max(stage.bytes(setting.tokens) for stage in stages)


def hidden_bytes(shape: Shape, setting: Setting) -> int:
    """The embeddings or the last norm's input, its output, and the output's gradient."""
    return BYTES_16 * setting.tokens * 3 * shape.hidden


def logits_bytes(shape: Shape, setting: Setting) -> int:
    """A chunk of logits, with the hidden states that it is computed from and their gradient."""
    rows = min(logits_rows(setting.tokens), setting.tokens)
    return BYTES_16 * rows * (shape.vocabulary + 2 * shape.hidden)


def summed_gradient_bytes(shape: Shape, setting: Setting) -> int:
    """The float32 sum of the gradients of earlier micro batches; with shares= one for each level of their tree."""
    sums = setting.shares.bit_length() if setting.shares > 1 else int(setting.accumulation > 1)
    return 4 * adapter_parameters(shape, setting) * sums


def update_bytes(shape: Shape, setting: Setting) -> int:
    """Gradients in wider types, while ZeRO takes them over or the optimizer works."""
    return max(UPDATE_BYTES + lora_plus_bytes(setting), REDUCE_BYTES) * adapter_parameters(shape, setting)


def adapter_bytes(setting: Setting) -> int:
    """Bytes of a trainable parameter between steps."""
    return ADAPTER_BYTES + lora_plus_bytes(setting) + (START_BYTES if setting.start != "random" else 0)


def lora_plus_bytes(setting: Setting) -> int:
    """Bytes of a trainable parameter that a larger rate of B takes."""
    return LORA_PLUS_BYTES if setting.lora_plus != 1 else 0


def captured_bytes(shape: Shape, setting: Setting) -> int:
    """What graphs hold during the whole step, and the larger of what the loss and the update add to it."""
    passes = max(largest(forward_stages(shape, setting), setting), largest(backward_stages(shape, setting), setting))
    outside = max(logits_bytes(shape, setting), update_bytes(shape, setting))
    return saved_bytes(shape, setting) + passes + summed_gradient_bytes(shape, setting) + outside


# --- what it takes of the host


def host_bytes(shape: Shape, setting: Setting) -> int:
    """Bytes of the machine's memory that a step keeps for the card.

    The embedding's table, and pinned memory for the inputs of blocks, which torch rounds up to a power of two.
    """
    table = BYTES_16 * shape.vocabulary * shape.hidden if setting.embedding == "host" and not shape.tied else 0
    inputs = BYTES_16 * setting.tokens * shape.hidden * (shape.layers - 1) if setting.checkpointing == "offload" else 0
    return table + (1 << (inputs - 1).bit_length() if inputs else 0)
