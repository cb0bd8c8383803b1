"""Decoding sessions of a model, kept for its next answers as long as the model lives."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from train.inference.decode_graph import CAPACITY_STEP, DecodeSession
from train.inference.decode_layers import DecodeLayers, is_more_than_low_rank
from train.model.decoder import Decoder
from train.ops import kernels
from train.ops.kernels.gptq_tiles import MAX_BATCH


class _ModelSessions:
    """What is kept of a model between answers: its layers as they were read, and the sessions that are not in use."""

    def __init__(self, signature: tuple[Any, ...], layers: DecodeLayers) -> None:
        self.signature, self.layers, self.free = signature, layers, list[DecodeSession]()


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, _ModelSessions] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module) -> nn.Module:
    """The model itself, or what peft wraps."""
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return base


def supports(model: nn.Module, batch: int) -> bool:
    """Whether `model` can decode `batch` rows in a session.

    That takes our decoder on a CUDA device with kernels, heads of a power of two, and a batch that the products take.
    """
    base: Any = decoder_of(model)
    if not isinstance(base, Decoder) or base.training or batch > MAX_BATCH:
        return False
    head_dim = base.config.head_dim
    embedding: Any = base.get_input_embeddings()
    device = embedding.weight.device
    return device.type == "cuda" and not head_dim & (head_dim - 1) and kernels.usable(device)


def _signature(base: nn.Module) -> tuple[Any, ...]:
    """Changes when a weight is replaced or moved, an Int4 weight overwritten, or an adapter switched.

    It is made before every answer, so it goes through the modules once: torch's iterators over parameters, buffers and
    modules take 10 ms for the 1,200 modules of 24 layers with adapters, which is longer than reading the prompt.
    """
    found: list[Any] = []
    modules = [base]
    while modules:
        module = modules.pop()
        found += [parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None]
        for buffer in module._buffers.values():
            if buffer is not None:
                found += (buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version)
        if "base_layer" in module._modules:
            found.append(_switches(module))
        modules += [child for child in module._modules.values() if child is not None]
    return tuple(found)


def _switches(layer: Any) -> tuple[Any, ...]:
    """Which of an adapted layer's adapters act, and how strongly."""
    if is_more_than_low_rank(layer):
        return (bool(layer.disable_adapters),)
    scales = tuple(layer.scaling[name] for name in layer.active_adapters if name in layer.lora_A)
    return (bool(layer.disable_adapters), bool(layer.merged), scales)


@contextmanager
def borrow(model: nn.Module, batch: int, length: int) -> Iterator[DecodeSession | None]:
    """A session for `batch` rows of `length` tokens, prompt and answer, for as long as the block runs.

    A free one is used again. None where the growing cache has to serve; if memory or Triton is the reason, it is
    printed.
    """
    session = _take(model, batch, length) if supports(model, batch) else None
    try:
        yield session
    finally:
        entry = _SESSIONS.get(model)
        if session is not None and entry is not None and entry.layers is session.layers:
            entry.free = [session]


def _take(model: nn.Module, batch: int, length: int) -> DecodeSession | None:
    base: Any = decoder_of(model)
    try:
        signature, entry = _signature(base), _SESSIONS.get(model)
        if entry is None or entry.signature != signature:
            _SESSIONS.pop(model, None)
            entry = _SESSIONS[model] = _ModelSessions(signature, DecodeLayers(base))
        free = next((s for s in entry.free if s.batch == batch and s.capacity >= length), None)
        entry.free.clear()  # frees its memory before more is taken
        return free or DecodeSession(entry.layers, batch, -(-length // CAPACITY_STEP) * CAPACITY_STEP)
    # no memory, or a layer that a graph cannot record; Triton raises a different class for each of its reasons
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"Decoding goes the slower way, without a CUDA graph: {reason}", file=sys.stderr)
        release(model)
        return None


def release(model: nn.Module) -> None:
    """Free the memory that is kept for the model's next answers."""
    _SESSIONS.pop(model, None)
