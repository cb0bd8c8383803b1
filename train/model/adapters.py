"""The adapter of a run, of whatever method: made, written, read and continued by the module of its method.

lora.py has LoRA and DoRA, peft_adapters.py has IA3, VeRA, LoHa and LoKr.
"""

from pathlib import Path

from torch import Tensor

from train.common.errors import UserError
from train.model import lora, peft_adapters
from train.model.adapter_file import AdapterFile, read_adapter
from train.model.decoder import Decoder
from train.model.layouts import DecoderConfig
from train.model.lora_layers import AdaptedModel, LoraSettings
from train.model.peft_file import TITLES, PeftFile, method_of, read_peft
from train.model.peft_layers import METHODS

AnyAdapter = AdapterFile | PeftFile


def attach(model: Decoder, settings: lora.AdapterSettings) -> AdaptedModel:
    """The decoder with new adapters, which change nothing yet; float32 and trainable."""
    return peft_adapters.attach(model, settings) if settings.method in METHODS else lora.attach(model, settings)


def save_adapter(
    model: AdaptedModel,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    factors: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapter's files as stock peft does. The arguments are those of lora.save_adapter."""
    if isinstance(model.settings, LoraSettings):
        lora.save_adapter(model, folder, tensors, factors)
    else:
        peft_adapters.save_adapter(model, folder, tensors)


def read(folder: Path) -> AnyAdapter:
    """The checked adapter of a folder. Raises UserError for none, a damaged one, or one that is not computed here."""
    return read_peft(folder) if method_of(folder) else read_adapter(folder)


def load_adapter(model: Decoder, folder: Path) -> AdaptedModel:
    """The decoder with the adapter of `folder`, of any peft; float32, frozen, in evaluation mode.

    Raises:
        UserError: no adapter in the folder, a damaged one, one that is not computed here, or one of another model.
    """
    return apply(model, read(folder))


def apply(model: Decoder, adapter: AnyAdapter) -> AdaptedModel:
    """As `load_adapter`, of an adapter that `read` gave."""
    if isinstance(adapter, PeftFile):
        return peft_adapters.apply(model, adapter)
    return lora.apply(model, adapter)


def check_start(adapter: AnyAdapter, settings: lora.AdapterSettings) -> None:
    """Check that training with `settings` computes what `adapter` does.

    Raises:
        UserError: what differs, and the values to give.
    """
    method = adapter.method if isinstance(adapter, PeftFile) else "lora"
    if method != settings.method:
        raise UserError(f"its adapter is {TITLES.get(method, 'LoRA')}. Give method={method}.")
    if isinstance(adapter, PeftFile):
        peft_adapters.check_start(adapter, settings)
    else:
        lora.check_start(adapter, settings)


def check_values(adapter: AnyAdapter) -> None:
    """Raises UserError for values that are not finite."""
    for _ in adapter.parts() if isinstance(adapter, PeftFile) else adapter.pairs():
        pass


def check_targets(adapter: AnyAdapter, settings: lora.AdapterSettings, config: DecoderConfig) -> None:
    """Check that training with `settings` has adapters on the very linears that `adapter` changes.

    Raises:
        UserError: it lacks some, or has others; the message names them.
    """
    if isinstance(adapter, PeftFile):
        peft_adapters.check_targets(adapter, settings, config)
    else:
        lora.check_targets(adapter, settings, config)


def copy_adapter(adapter: AnyAdapter, model: AdaptedModel) -> None:
    """Give the trainable parameters of `model` the values of `adapter`, which the checks accepted."""
    if isinstance(adapter, PeftFile):
        peft_adapters.copy_adapter(adapter, model)
    else:
        lora.copy_adapter(adapter, model)


def check_low_rank(folder: Path, reason: str) -> None:
    """Raises UserError for an adapter that is more than A and B, where a file or a program has these only."""
    if title := more_than_low_rank(folder):
        raise UserError(
            f"{folder} is {title}, and {reason}. Export the merged model: make export RUN=… (FORMAT=gguf writes the merged "
            "model, too)."
        )


def more_than_low_rank(folder: Path) -> str:
    """The name of the method of an adapter that is more than A and B: DoRA and peft's other ones; empty for LoRA."""
    if method := method_of(folder):
        return TITLES[method]
    return "DoRA" if read_adapter(folder).dora else ""
