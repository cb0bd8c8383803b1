"""DPO (Rafailov et al. 2023): the loss of choosing the better of two answers, from the losses of their tokens.

    loss = −log σ(β · h),  h = (log π(c) − log π₀(c)) − (log π(r) − log π₀(r))

c is the chosen answer, r the rejected one, π the model, π₀ the reference; β · (log π − log π₀) is the reward of an
answer. With label smoothing s (Mitchell's conservative DPO): −(1 − s) · log σ(β h) − s · log σ(−β h). Knows tokens and
numbers of sequences, and nothing of models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = (
    "reward_accuracy",
    "reward_margin",
    "chosen_reward",
    "rejected_reward",
)  # after the loss, in `preference_sums`


def sequence_numbers(segment_ids: Tensor) -> tuple[Tensor, int]:
    """(the number of each position's sequence, int64 [B, T]; how many numbers there are, an even count).

    Args:
        segment_ids: [B, T] int64, 1, 2, … in each row; 0 for padding, whose number is that of segment 1.
    Numbers 2n and 2n + 1 are the chosen and the rejected sequence of a pair; in rows with fewer segments some are unused.
    """
    each = (int(segment_ids.max()) + 1) // 2 * 2 or 2
    rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
    return rows * each + (segment_ids - 1).clamp_min(0), len(segment_ids) * each


def preference_sums(
    policy: Tensor, reference: Tensor, numbers: Tensor, count: int, beta: float, label_smoothing: float
) -> Tensor:
    """[5] float32, summed over the pairs: the loss, then METRICS, which have no gradient.

    Args:
        policy, reference: [L] float32, the cross entropy of each labelled token by the model and by the reference.
        numbers: [L] int64, the sequence of each, below `count`; see `sequence_numbers`. A pair without tokens counts
            nothing.
    """
    of_sequence = numbers == torch.arange(count, device=numbers.device)[:, None]  # [count, L]
    # Differences first: both sums are large, and nearly equal. Not index_add_, which adds in any order on a GPU.
    ratios = torch.where(of_sequence, reference - policy, 0.0).sum(1)  # log π − log π₀ of each sequence
    chosen, rejected = (beta * ratios).view(-1, 2).unbind(1)
    valid = of_sequence.any(1).view(-1, 2).all(1)
    margin = chosen - rejected
    losses = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    metrics = [(margin > 0).float(), margin, chosen, rejected]
    return torch.stack([(x * valid).sum() for x in (losses, *(x.detach() for x in metrics))])
