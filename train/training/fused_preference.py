"""DPO by the fused passes: the reference by the same passes, and the gradient of a pair's loss from those of its tokens.

graph_step.py calls both functions in a step. Knows the layout of a batch on the device, and nothing of engines.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.ops.cross_entropy import token_losses
from train.training.preference import PreferenceLoss

if TYPE_CHECKING:
    from train.training.graph_step import DeviceBatch, GraphStep


def reference_losses(preference: PreferenceLoss, step: "GraphStep", batch: "DeviceBatch", rows: int) -> Tensor:
    """The reference's loss [L] of each label; `rows` of logits are in memory at once.

    By the fused passes on the adapter's values before training, so that both models round alike. Dropout is a part of
    these passes; where it would change the reference, the decoder's own compute it.
    """
    if preference.start is not None and step.has_dropout:
        segments, positions = batch.tokens.segment_ids, batch.tokens.positions
        inputs = (batch.input_ids.view_as(segments), positions.view_as(segments), segments)
        return preference.reference(*inputs, batch.labelled_positions, batch.labels, rows)
    passes, neftune, now = step.passes_for(batch), step.neftune, step.vector.detach().clone()
    step.neftune = 0.0
    if preference.start is None:
        step.vector.data.zero_()
    else:
        step.vector.data.copy_(step.start_vector(preference.start))
    hidden, _ = passes.forward(batch, step, learns=False)
    losses = token_losses(hidden, step.decoder.lm_head.weight, batch.labelled_positions, batch.labels, rows)
    step.vector.data.copy_(now)
    step.neftune = neftune
    passes.forget()
    return losses


def weigh(
    preference: PreferenceLoss, batch: "DeviceBatch", losses: Tensor, reference: Tensor, grad_hidden: Tensor
) -> Tensor:
    """The sums [5] of a batch of pairs from the loss [L] of each token by the model and by its reference.

    Each row of `grad_hidden` [M, H] is the gradient of its own token's loss, and is multiplied with the derivative of
    the pairs' loss for that one.
    """
    assert batch.numbers is not None, "a batch without the numbers of its sequences"
    with torch.enable_grad():
        losses.requires_grad_()
        sums = preference.sums(losses, reference, batch.numbers, batch.sequences)
        (weights,) = torch.autograd.grad(sums[0], losses)
    of_rows = torch.zeros(len(grad_hidden), dtype=grad_hidden.dtype, device=grad_hidden.device)
    of_rows.index_copy_(0, batch.labelled_positions, weights.to(grad_hidden.dtype))
    grad_hidden.mul_(of_rows[:, None])
    return sums.detach()
