"""Fine-tune Qwen on an Int4 checkpoint: LoRA training, a faithful merge, chat.

Twelve folders named after tasks; imports run downwards only, and tests/test_house.py holds them to it. README.md in this folder
has a phrase for each file.
"""

import os

# Before torch is imported, which reads it then: nothing here is compiled by inductor, whose workers would wait, a process a core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

__version__ = "0.1.0"
