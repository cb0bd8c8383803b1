"""The loss of preference data (DPO): the model that is trained against the reference, in the same step.

The reference is the model before training: the base with the adapter off; or, where the run begins with another run's
adapter, the base with that adapter, whose values are kept. It takes a forward pass more than other training does, and
no second copy of the base. Knows the decoder and its adapter; nothing of engines, optimizers and files.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.model.lora import trainable
from train.ops.cross_entropy import CHUNK, IGNORE, token_cross_entropy
from train.ops.preference_loss import METRICS, preference_sums, sequence_numbers

__all__ = ["METRICS", "PreferenceLoss"]


def changes_nothing(model: Any) -> bool:
    """Whether the adapter changes nothing yet: every parameter but A is zero."""
    return not any(bool(p.any()) for name, p in trainable(model).items() if ".lora_A." not in name)


class PreferenceLoss:
    """The summed loss and METRICS of batches of pairs.

    `model` is the decoder with its adapter, as it is before training: then its reference is fixed.
    """

    def __init__(self, model: Any, beta: float, label_smoothing: float) -> None:
        self.model, self.beta, self.label_smoothing = model, beta, label_smoothing
        # The values of the adapter before training, which the reference has; None: they change nothing. With start= they
        # change nothing either, but only beside the same values that are subtracted from the base.
        self.start = None if changes_nothing(model) else {n: p.detach().clone() for n, p in trainable(model).items()}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """[1 + METRICS] float32: the summed loss, with its gradient through the decoder, and the sums of METRICS.

        Args:
            batch: of data.batches.collate, on the model's device; odd segments are chosen, even ones rejected.
        """
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        positions = (labels != IGNORE).nonzero().squeeze(1)
        inputs = (batch["input_ids"], batch["position_ids"], batch["segment_ids"], positions, labels[positions])
        numbers, count = sequence_numbers(batch["segment_ids"])
        reference = self.reference(*inputs)
        return self.sums(self._losses(*inputs), reference, numbers.flatten()[positions], count)

    def sums(self, policy: Tensor, reference: Tensor, numbers: Tensor, count: int) -> Tensor:
        """`preference_sums` with the settings of this run."""
        return preference_sums(policy, reference, numbers, count, self.beta, self.label_smoothing)

    @torch.no_grad()
    def reference(
        self, ids: Tensor, positions: Tensor, segments: Tensor, labelled: Tensor, labels: Tensor, chunk: int = CHUNK
    ) -> Tensor:
        """The reference's loss [L] of each label, without dropout and noise. It draws no random number.

        Args:
            ids, positions, segments: [B, T] int64. labelled: [L], the flat positions whose successor is a label.
            labels: [L]. chunk: rows of logits in memory at once.
        """
        with ExitStack() as stack:
            stack.enter_context(without_noise(self.model))
            stack.enter_context(self.model.disable_adapter() if self.start is None else self._with_start(self.start))
            return self._losses(ids, positions, segments, labelled, labels, chunk)

    def _losses(
        self, ids: Tensor, positions: Tensor, segments: Tensor, labelled: Tensor, labels: Tensor, chunk: int = CHUNK
    ) -> Tensor:
        decoder = self.model.get_base_model()
        hidden, _ = decoder.backbone(ids, None, positions, segments, None, False)
        return token_cross_entropy(hidden.flatten(0, 1), decoder.lm_head.weight, labelled, labels, chunk)

    @contextmanager
    def _with_start(self, start: dict[str, Tensor]) -> Iterator[None]:
        """Within the block the adapter has the values of `start`, in the dtype that it has now."""
        parameters = trainable(self.model)
        now = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            start[name] = start[name].to(p)  # once: DeepSpeed has cast the parameters since
            p.data = start[name]
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.data = now[name]


@contextmanager
def without_noise(model: Any) -> Iterator[None]:
    """Within the block the model that is trained computes without dropout and without NEFTune's noise."""
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    backbone = model.get_base_model().backbone
    neftune, backbone.neftune = backbone.neftune, 0.0
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        backbone.neftune = neftune
        for module in dropouts:
            module.train()
