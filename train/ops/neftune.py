"""NEFTune: uniform noise on the embeddings of a training step (Jain et al. 2023).

Each value of a token gets noise in ±alpha / sqrt(L · H), where L is the number of tokens of its own conversation, so
that packing several in a row changes nothing. Padding gets noise as a conversation does; nothing reads it.
"""

import torch
from torch import Tensor


def conversation_lengths(segment_ids: Tensor) -> Tensor:
    """The number of tokens [B, T] int64 of the conversation that each token belongs to, from its number in segment_ids [B, T].

    Padding, number 0, counts as one conversation of its row.
    """
    same = torch.zeros(len(segment_ids), int(segment_ids.max()) + 1, dtype=torch.long, device=segment_ids.device)
    same.scatter_add_(1, segment_ids, torch.ones_like(segment_ids))
    return same.gather(1, segment_ids)


def add_noise(embeddings: Tensor, lengths: Tensor, alpha: float, seed: int) -> Tensor:
    """Add NEFTune's noise in place, and return the embeddings.

    Args:
        embeddings: [M, H]. lengths: [M], the tokens of each token's conversation. seed: of the noise, which is drawn on
            the device: the same device and seed give the same bits.
    """
    generator = torch.Generator(embeddings.device).manual_seed(seed)
    noise = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
    noise.uniform_(-1, 1, generator=generator)
    bound = alpha / torch.sqrt(lengths.float() * embeddings.shape[1])
    return embeddings.add_((noise * bound[:, None]).to(embeddings.dtype))


def draw_seed() -> int:
    """A seed from torch's generator on the CPU, whose state is in every checkpoint."""
    return int(torch.randint(2**40, (1,)))
