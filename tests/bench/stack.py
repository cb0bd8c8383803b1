"""The published recipe's stack in a model's shape: transformers' Llama, auto_gptq's linears, peft and DeepSpeed.

As Qwen's finetune_qlora_single_gpu.sh runs it. transformers' LlamaForCausalLM computes what the checkpoint's own code
does, and auto_gptq's QuantLinear is the one that optimum picks without exllama, as for training. Knows nothing of
clocks, shapes of batches or reports.
"""

import io
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.bench import shapes
from train.model.layouts import DecoderConfig
from train.model.loading import read_folder_config, read_tensors, tensor_files
from train.training.deepspeed_engine import import_deepspeed

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stock_llama(c: DecoderConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' LlamaForCausalLM with auto_gptq's QuantLinear for every linear of its blocks, random, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")
    published = LlamaConfig(attention_bias=True, pad_token_id=None, use_cache=False, **{k: getattr(c, k) for k in same})
    with torch.device("meta"):
        model = LlamaForCausalLM(published)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quant_linear(linear, shapes.group_of(c), device, dtype))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            value = torch.ones(p.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(value if p.dim() == 1 else value.normal_(std=0.02)))
    model.tie_weights()
    with torch.device(device):
        for layer in model.model.layers:  # its tables of sines are not parameters, and are still on the meta device
            layer.self_attn._init_rope()
    return model.requires_grad_(False)


def stock_from(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same with the weights of an Int4 folder in layout qwen2, whose names are Llama's.

    Raises:
        ValueError: a tensor that Llama does not have, or one of Llama's that the folder lacks (except o_proj's bias,
            which is zero).
    """
    c, _ = read_folder_config(folder)
    model = stock_llama(c, device, dtype)
    state = dict(read_tensors(tensor_files(folder)))
    if c.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("o_proj.bias")]
    if missing or result.unexpected_keys:
        raise ValueError(f"{folder}: missing {missing[:3]}, left over {result.unexpected_keys[:3]}")
    return model


def quant_linear(linear: nn.Linear, group: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """auto_gptq's layer instead of `linear`: the class that peft expects where exllama is disabled, as for training."""
    from auto_gptq.utils.import_utils import dynamically_import_QuantLinear

    kind = dynamically_import_QuantLinear(
        use_triton=False, desc_act=False, group_size=group, bits=4, disable_exllama=True, disable_exllamav2=True
    )
    bias = linear.bias is not None
    layer = kind(4, group, linear.in_features, linear.out_features, bias, trainable=True, weight_dtype=dtype).to(device)
    for name, buffer in layer.named_buffers():
        shapes.random_part(name, buffer, layer)
    return layer  # type: ignore[no-any-return]


def adapt(base: Any, rank: int, dropout: float, checkpointing: bool) -> nn.Module:
    """The model with peft's adapters, attached as in Qwen's finetune.py."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import GPTQConfig

    quantised = next(m for m in base.modules() if hasattr(m, "qweight"))
    base.quantization_method = "gptq"
    base.config.quantization_config = GPTQConfig(bits=4, group_size=quantised.group_size, disable_exllama=True)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    config = LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)  # type: ignore[no-any-return]


def deepspeed_engine(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, dtype: torch.dtype) -> Any:
    """DeepSpeed with the settings of the published finetune/ds_config_zero2.json."""
    deepspeed = import_deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    fp16 = {"enabled": dtype == torch.float16, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
    stage = {"stage": 2, "allgather_bucket_size": int(2e8), "reduce_bucket_size": int(2e8), "overlap_comm": True}
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "fp16": fp16,
        "zero_optimization": {**stage, "reduce_scatter": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine
