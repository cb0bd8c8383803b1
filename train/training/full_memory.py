"""The memory of a step with method=full on a GPU: every weight trained by torch's autograd, from the shapes alone.

Counts what autograd saves of a block of model/decoder.py in 16 bits, which a test compares with the code, and what ZeRO 2
keeps of every parameter, as its source has it. Not compared with a card. memory_plan.py chooses between this and the
estimate of adapters. Imports no torch.
"""

from train.model.architecture import Shape
from train.training.memory_estimate import (
    ALLOCATOR_GAPS,
    ALLOCATOR_GAPS_SHARE,
    BYTES_16,
    CUBLAS_WORKSPACES,
    Estimate,
    hidden_bytes,
    logits_bytes,
)
from train.training.memory_setting import Setting

FLOAT = 4  # bytes of a float32 value
STATE_BYTES = FLOAT + 2 * FLOAT  # of a parameter in the optimizer: master and AdamW's two moments
WRITING_BYTES = (
    2 * FLOAT
)  # of a parameter: safetensors copies a file before it is written, of which moments are the largest
# A gradient in 16 bits is copied into a bucket before it is added up: reduce_bucket_size of zero2.json, values
BUCKET = 50_000_000


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """What one step takes at its peak."""
    constant, stages = constant_parts(shape, setting), stage_parts(shape, setting)
    at_rest = sum(constant.values())
    totals = {name: at_rest + sum(parts.values()) for name, parts in stages.items()}
    peak = max(totals, key=lambda name: totals[name])
    gaps = ALLOCATOR_GAPS + int(ALLOCATOR_GAPS_SHARE * saved_bytes(shape, setting))
    return Estimate({**constant, **stages[peak]}, totals, peak.partition(":")[0], at_rest, totals[peak] + gaps)


def constant_parts(shape: Shape, setting: Setting) -> dict[str, int]:
    """What is allocated all the time, by name. The processes of a run share masters and moments out among them."""
    return {
        "weights": BYTES_16 * shape.parameters,
        "float32 masters, AdamW": STATE_BYTES * shape.parameters // setting.shards,
        "cuBLAS workspaces": CUBLAS_WORKSPACES,
    }


def stage_parts(shape: Shape, setting: Setting) -> dict[str, dict[str, int]]:
    """What each stage of a step adds to the constant parts: "PHASE: STAGE" -> name -> bytes."""
    saved, block = {"saved activations": saved_bytes(shape, setting)}, block_bytes(shape, setting)
    sums = FLOAT * shape.parameters // setting.shards
    earlier = {"gradients of earlier micro batches": sums} if setting.accumulation > 1 else {}
    table = shape.vocabulary * shape.hidden
    bucket = BYTES_16 * (BUCKET + max(table, shape.hidden * shape.inner))  # and the gradient that is copied into it
    loss = hidden_bytes(shape, setting) + BYTES_16 * setting.tokens * shape.hidden + logits_bytes(shape, setting)
    again = block if setting.checkpointing != "off" else 0
    return {
        "forward: a block": {**earlier, **saved, "forward pass": block},
        "loss": {**earlier, **saved, "loss": loss + (FLOAT + BYTES_16) * table},
        "backward: the last block": {**earlier, **saved, "backward pass": (FLOAT + BYTES_16) * table + again + block},
        "backward: the first block": {"gradients in float32": sums, "backward pass": again + block + bucket},
        "update": {"gradients in float32, and flat": 2 * sums},
    }


def saved_bytes(shape: Shape, setting: Setting) -> int:
    """What the forward pass saves on the card: the mask, and all of every block or with checkpointing their inputs."""
    mask = setting.tokens * setting.length
    if setting.checkpointing == "off":
        return mask + shape.layers * block_bytes(shape, setting)
    inputs = shape.layers if setting.checkpointing == "on" else 1
    return mask + BYTES_16 * setting.tokens * inputs * shape.hidden


def block_bytes(shape: Shape, setting: Setting) -> int:
    """What autograd saves of one block, its input included."""
    return BYTES_16 * setting.tokens * block_values(shape, setting.length)


def block_values(shape: Shape, length: int) -> int:
    """Values of 16 bits that autograd saves of one block for each token; one of 32 bits counts as two.

    A norm saves its input and the factor of its row in 32 bits, the normed values and its output; attention q, k and v with
    every head, its output, the logarithms of its sums in 32 bits, and its mask; the MLP gate, silu(gate), up and their
    product. Where v has as many heads as q it is a part of one tensor with q and k, which keeps these too.
    """
    norms = 2 * (2 + 1 + 1) * shape.hidden + 2 * 2
    of_heads = 3 * shape.normed_heads + 2 * shape.normed_heads // shape.head_size
    attention = 4 * shape.queries + 2 * shape.heads + length
    beside_v = shape.qkv - shape.queries if shape.heads == shape.key_heads else 0
    return norms + of_heads + attention + beside_v + 4 * shape.inner


def host_bytes(shape: Shape, setting: Setting) -> int:
    """Bytes of the machine's memory: a checkpoint before it is written, and the inputs of blocks with offload.

    A checkpoint is copied into pinned memory, of which torch rounds each tensor up to a power of two.
    """
    inputs = BYTES_16 * setting.tokens * shape.hidden * shape.layers if setting.checkpointing == "offload" else 0
    tables = [shape.vocabulary * shape.hidden] * (1 if shape.tied else 2)
    matrices = [*tables, *(k * n for _, k, n in shape.linears() for _ in range(shape.layers))]
    pinned = sum(1 << (FLOAT * size - 1).bit_length() for size in matrices)
    return STATE_BYTES // FLOAT * pinned + WRITING_BYTES * shape.parameters + inputs
