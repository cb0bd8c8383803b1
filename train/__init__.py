"""Fine-tune Qwen on an Int4 checkpoint: LoRA training, a faithful merge, chat.

Four floors; imports run downwards only (tests/test_house.py):
verbs (train/verbs) over assembled (loader, dataset, generate, checkpoint, manifest, report) over parts (decoder, layouts,
lora, tokenizer, chatml, from_gguf) over leaves (gptq, loss, conversations, config, errors, files).
"""

__version__ = "0.1.0"
