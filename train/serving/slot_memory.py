"""How many requests have a place in memory, and of how many tokens: from what the card, or the machine, has free."""

from dataclasses import dataclass

import torch

from train.common.errors import UserError
from train.common.memory import free_memory
from train.inference.decode_layers import DecodeLayers
from train.inference.slot_session import CHUNK, bytes_per_token

MAX_SLOTS = 64
MAX_LENGTH = 8192  # tokens of a slot, unless the user asks for more: every slot takes memory for all of them
SHARE = 0.8  # of the memory that is free once the weights are loaded; the rest is for activations and graphs
SHARE_OF_HOST = 0.25  # the machine's memory is also for other programs, and used only as far as answers are long
ON_CPU = 16  # answers at once on a CPU, where more only make all of them slow


@dataclass(frozen=True)
class SlotPlan:
    """slots: requests at once. length: tokens of each, prompt and answer. capacity: `length`, rounded up."""

    slots: int
    length: int
    capacity: int
    size: int  # bytes

    def __str__(self) -> str:
        return (
            f"{self.slots} answers at once of {self.length:,} tokens, prompt and answer "
            f"({self.size / 1e9:.2f} GB of keys and values)"
        )


def plan_slots(layers: DecodeLayers, context: int, slots: int, length: int) -> SlotPlan:
    """Args: slots, length: what the user wants, 0 where it is left to us.

    Raises:
        UserError: what is wanted does not fit.
    """
    if layers.device.type == "cuda":
        free, most = SHARE * torch.cuda.mem_get_info(layers.device)[0], MAX_SLOTS
    else:
        free, most = SHARE_OF_HOST * free_memory(), ON_CPU
    return fit(free, bytes_per_token(layers), context, slots, length, most)


def fit(free: float, token: int, context: int, slots: int, length: int, most: int = MAX_SLOTS) -> SlotPlan:
    """The plan for `free` bytes where a token takes `token`; without wishes, slots are given up before tokens.

    Raises:
        UserError: see plan_slots.
    """
    if length > context:
        raise UserError(f"length={length}: the model's context has {context:,} tokens.")
    wanted = length or min(context, MAX_LENGTH)
    if not length:
        while wanted > CHUNK and free < 2 * token * _rounded(wanted):  # two slots are worth more than a long one
            wanted = -(-wanted // 2)
    size = token * _rounded(wanted)
    held = int(free // size) - 1  # and the spare one
    if held < max(slots, 1):
        raise UserError(
            f"{max(slots, 1)} answers at once of {wanted:,} tokens take {size * (max(slots, 1) + 1) / 1e9:.2f} GB of keys "
            f"and values; {free / 1e9:.2f} GB are free for them. Give fewer slots= or a smaller length=."
        )
    count = slots or min(held, most)
    return SlotPlan(count, wanted, _rounded(wanted), size * (count + 1))


def _rounded(length: int) -> int:
    return -(-length // CHUNK) * CHUNK
