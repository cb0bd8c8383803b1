"""Sizes that the training step chooses for itself, and that its memory estimate counts with; imports no torch."""

# The rows of a micro batch are padded to a multiple of this many tokens, so that few CUDA graphs serve all batches
ROW_MULTIPLE = 64
# From this many tokens on, a block under checkpointing runs its MLP in two halves: gate and up are the widest tensors
HALVED_MLP_TOKENS = 4096
# Rows of logits that the loss has in memory at once on a GPU, where they have 16 bits: 311 MB for Qwen's vocabulary of
# 151,936. Fewer rows leave a large GPU partly idle. Half as many for a micro batch of at most FEW_TOKENS, where logits
# are a larger part of the memory
LOGITS_ROWS, FEW_TOKENS = 1024, 4096


def padded(tokens: int) -> int:
    """A row's length after padding."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def logits_rows(tokens: int) -> int:
    """Rows of logits at once on a GPU, for a micro batch of so many tokens."""
    return LOGITS_ROWS if tokens > FEW_TOKENS else LOGITS_ROWS // 2


# Blocks at each end of the decoder whose forward products stay in 16 bits with precision=fp8: rounding them costs the
# loss the most
FP8_END_BLOCKS = 1


def forward_in_fp8(layers: int) -> range:
    """The numbers of the blocks whose forward products are in fp8, of a decoder with so many."""
    return range(FP8_END_BLOCKS, max(FP8_END_BLOCKS, layers - FP8_END_BLOCKS))
