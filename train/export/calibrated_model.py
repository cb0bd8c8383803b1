"""A model that is quantised by GPTQ block by block, and measured on the way. One block is on the device at a time.

The hidden states of all rows stay on the host. Those of the calibration rows come from blocks that are quantised
already, so each block makes up for the errors of those before it. The held-out rows go through three models: the float
one, the one that is rounded to nearest, and the one that GPTQ makes. All computation is in float32.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.common.threads import on_cores
from train.export.calibration import Rows, TokenPass
from train.export.gptq_linear import State, quantize_linears
from train.model.decoder import AttentionInputs, DecoderBlock, rope_tables, sdpa_mask, token_positions
from train.model.layouts import DecoderConfig
from train.ops.gptq import Scheme, dequantize, quantize

MODELS = ("float", "nearest", "gptq")  # that the held-out rows go through
HEAD_TOKENS = 64  # tokens whose logits are computed at once

Hidden = list[Tensor]  # [1, T, H] float32 on the host, one for each pass
Run = Callable[[Tensor, AttentionInputs], Any]


class CalibratedModel:
    """The hidden states of all rows after the blocks that are done."""

    def __init__(self, config: DecoderConfig, scheme: Scheme, rows: Rows, table: Tensor, device: torch.device) -> None:
        """table: the embedding [V, H]. config: of the layout in which the blocks come."""
        self.config, self.scheme, self.rows, self.device = config, scheme, rows, device
        self.calibration = _embedded(table, rows.calibration)
        start = _embedded(table, rows.held_out)
        self.held_out: dict[str, Hidden] = {name: list(start) for name in MODELS}

    @torch.no_grad()
    def pack_block(self, number: int, state: State) -> tuple[dict[str, State], dict[str, float]]:
        """Quantise block `number`, and take all rows through it.

        Args:
            state: the tensors of the block by their full names, in the layout of `config`.
        Returns:
            (name of a linear -> its packed tensors, name of a linear -> relative error ‖Ŵ − W‖ / ‖W‖)
        """
        prefix = f"{self.config.names.block(number)}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        block = load_block(self.config, own, self.device)
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        self._measure("float", block)
        _set_weights(linears, _rounded(linears, self.scheme))
        self._measure("nearest", block)
        for name, linear in linears.items():
            linear.weight.data = own[f"{name}.weight"].to(self.device, torch.float32)
        packed = self._quantise(block)
        self._measure("gptq", block)
        errors = {prefix + name: _error(linears[name].weight, own[f"{name}.weight"].to(self.device)) for name in packed}
        return {prefix + name: tensors for name, tensors in packed.items()}, errors

    def _quantise(self, block: DecoderBlock) -> dict[str, State]:
        """Quantise the linears in the order in which they are computed, and take the calibration rows through the block.

        Each linear sees what the quantised ones before it give, as with auto-gptq's `true_sequential`.
        """
        names, packed = self.config.names, dict[str, State]()
        attention = f"{names.attention}."
        mlp = f"{names.mlp}."
        for run, stages in (
            (partial(_attention, block), ([attention + name for name in names.qkv], [attention + names.out])),
            (partial(_mlp, block), ([mlp + names.gate, mlp + names.up], [mlp + names.down])),
        ):
            for stage in stages:
                linears = {name: block.get_submodule(name) for name in stage}
                inputs = self._inputs_of(next(iter(linears.values())), run)
                weights: dict[str, Tensor] = {name: linear.weight for name, linear in linears.items()}  # type: ignore[misc]
                made = quantize_linears(weights, inputs, self.scheme, self.device)
                _set_weights(
                    linears, {name: unpacked(tensors, self.scheme, self.device) for name, tensors in made.items()}
                )
                packed |= made
            self.calibration = [
                (x := hidden.to(self.device)).add(run(x, inputs)).to("cpu")
                for hidden, inputs in zip(self.calibration, self._attention_inputs(self.rows.calibration), strict=True)
            ]
        return packed

    def _inputs_of(self, linear: nn.Module, run: Run) -> Iterator[Tensor]:
        """What `linear` reads of each pass over the calibration rows: [T, K]. What follows it is not computed."""
        for hidden, inputs in zip(self.calibration, self._attention_inputs(self.rows.calibration), strict=True):
            yield input_of(linear, partial(run, hidden.to(self.device), inputs)).flatten(0, -2)

    def _attention_inputs(self, passes: list[TokenPass]) -> Iterator[AttentionInputs]:
        for one in passes:
            segments = one.segments.to(self.device)
            positions = token_positions(None, segments, 0, one.ids.to(self.device))
            cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
            length = one.ids.shape[1]
            yield cos, sin, None, sdpa_mask(None, segments, length, length, self.device), None

    def _measure(self, model: str, block: DecoderBlock) -> None:
        """Take the held-out rows of one of MODELS through its form of the block."""
        inputs = self._attention_inputs(self.rows.held_out)
        self.held_out[model] = [
            block(hidden.to(self.device), one)[0].to("cpu")
            for hidden, one in zip(self.held_out[model], inputs, strict=True)
        ]

    @torch.no_grad()
    def perplexities(self, norm: nn.Module, head: Tensor) -> dict[str, float]:
        """exp of the mean loss of the answer tokens of the held-out rows, of each of MODELS, after all blocks.

        Args:
            norm: the last norm. head: [V, H], on `device` both, in float32.
        """
        return {name: math.exp(self._loss(self.held_out[name], norm, head)) for name in MODELS}

    def _loss(self, hidden: Hidden, norm: nn.Module, head: Tensor) -> float:
        total, count = 0.0, 0
        for states, one in zip(hidden, self.rows.held_out, strict=True):
            chosen = one.labelled[0, 1:]
            before, wanted = states[0, :-1][chosen].to(self.device), one.ids[0, 1:][chosen].to(self.device)
            for x, y in zip(before.split(HEAD_TOKENS), wanted.split(HEAD_TOKENS), strict=True):
                logits = nn.functional.linear(norm(x), head)
                total += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            count += int(chosen.sum())
        return total / count


# Blocks


def load_block(config: DecoderConfig, state: State, device: torch.device) -> DecoderBlock:
    """A block in float32 with the tensors of `state`, named as in the block. What stays float is rounded to float16, as written."""
    with torch.device("meta"):
        block = DecoderBlock(config)
    linears = {f"{name}.weight" for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    for name in state:
        module, _, part = name.rpartition(".")
        if part == "bias" and getattr(block.get_submodule(module), "bias", None) is None:
            block.get_submodule(module).register_parameter("bias", nn.Parameter(torch.empty(0, device="meta")))
    own = {name: t if name in linears else t.half() for name, t in state.items()}
    block.load_state_dict({name: t.to(device, torch.float32) for name, t in own.items()}, assign=True)
    return block.requires_grad_(False).eval()


def unpacked(packed: State, scheme: Scheme, device: torch.device) -> Tensor:
    """The float32 weight [N, K] of packed tensors, on `device`."""
    qweight, qzeros, scales = (packed[key].to(device) for key in ("qweight", "qzeros", "scales"))
    return dequantize(qweight, qzeros, scales, None, scheme.bits).t().contiguous()


def _rounded(linears: dict[str, nn.Linear], scheme: Scheme) -> dict[str, Tensor]:
    """Each weight rounded to nearest and made float again."""

    def one(item: tuple[str, nn.Linear]) -> Tensor:
        weight = item[1].weight
        return unpacked(quantize(weight, scheme, item[0]), scheme, weight.device)

    on_gpu = any(linear.weight.is_cuda for linear in linears.values())
    return dict(zip(linears, on_cores(one, linears.items(), most=1 if on_gpu else None), strict=True))


def _set_weights(linears: Any, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        linears[name].weight.data = weight


def _error(rounded: Tensor, weight: Tensor) -> float:
    return float((rounded - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))


def _attention(block: DecoderBlock, x: Tensor, inputs: AttentionInputs) -> Tensor:
    """What the attention of a block adds to x."""
    names = block.names
    y: Tensor = getattr(block, names.attention)(getattr(block, names.norm1)(x), *inputs)[0]
    return y


def _mlp(block: DecoderBlock, x: Tensor, inputs: AttentionInputs) -> Tensor:
    """What the MLP of a block adds to x."""
    y: Tensor = getattr(block, block.names.mlp)(getattr(block, block.names.norm2)(x))
    return y


class _Found(Exception):  # noqa: N818  # no error: it ends a pass early
    """The input that was waited for."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def input_of(linear: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What `linear` is given first when `run` is called; the rest of `run` is left out."""

    def found(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Found(args[0])

    handle = linear.register_forward_pre_hook(found)
    try:
        run()
    except _Found as one:
        return one.x
    finally:
        handle.remove()
    raise AssertionError("the linear was not reached")


def _embedded(table: Tensor, passes: list[TokenPass]) -> Hidden:
    """The rows of the table, rounded to float16 as they are written."""
    return [table[one.ids].half().float() for one in passes]
