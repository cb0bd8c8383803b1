"""Logs of failed runs, as people post them, each with the cause that it must be explained by; and logs of sound runs."""

import pytest

from train.host.failures import FAILURES, explain_log

# name of the failure -> log. The last lines of a log, of the length in which people send them.
FAILED = {
    "dispatch_batches": """
Loading checkpoint shards: 100%|##########| 2/2 [00:08<00:00,  4.1s/it]
Traceback (most recent call last):
  File "finetune.py", line 360, in train
    trainer = Trainer(model=model, tokenizer=tokenizer, args=training_args, **data_module)
  File ".../transformers/trainer.py", line 3864, in create_accelerator_and_postprocess
    self.accelerator = Accelerator(
TypeError: Accelerator.__init__() got an unexpected keyword argument 'dispatch_batches'
""",
    "Python.h": """
  building 'mpi4py.MPI' extension
  x86_64-linux-gnu-gcc -Wno-unused-result -fPIC -I/usr/include/python3.10 -c src/mpi4py/MPI.c -o build/MPI.o
  src/mpi4py/MPI.c:31:10: fatal error: Python.h: No such file or directory
     31 | #include "Python.h"
  compilation terminated.
  error: Cannot compile MPI programs. Check your configuration!!!
  ERROR: Failed building wheel for mpi4py
""",
    "MPI compiler": """
  checking for MPI compile and link ...
  _configtest.c:2:10: fatal error: mpi.h: No such file or directory
  failure.
  ERROR: Failed building wheel for mpi4py
ERROR: Could not build wheels for mpi4py, which is required to install pyproject.toml-based projects
""",
    "GPTQ's packages": """
  File ".../transformers/modeling_utils.py", line 2770, in from_pretrained
    raise ImportError(
ImportError: Loading a GPTQ quantized model requires optimum library : `pip install optimum` and auto-gptq library 'pip install auto-gptq'
""",
    "DeepSpeed missing": """
[INFO] world size 1
  File ".../transformers/deepspeed.py", line 21, in <module>
    from accelerate.utils.deepspeed import HfDeepSpeedConfig as DeepSpeedConfig
ModuleNotFoundError: No module named 'deepspeed'
""",
    "mpi4py missing": """
[2024-01-08 10:11:12,190] [INFO] [comm.py:637:init_distributed] cdb=None
[2024-01-08 10:11:12,190] [INFO] [comm.py:652:init_distributed] Not using the DeepSpeed or dist launchers, attempting to detect MPI environment...
  File ".../deepspeed/comm/comm.py", line 684, in mpi_discovery
    from mpi4py import MPI
ModuleNotFoundError: No module named 'mpi4py'
""",
    "Qwen-1's packages": """
  File ".../transformers/dynamic_module_utils.py", line 180, in check_imports
ImportError: This modeling file requires the following packages that were not found in your environment: transformers_stream_generator. Run `pip install transformers_stream_generator`
""",
    "AutoGPTQ's kernels": """
WARNING:auto_gptq: loading
ImportError: /opt/conda/lib/python3.10/site-packages/autogptq_cuda_64.cpython-310-x86_64-linux-gnu.so: undefined symbol: _ZN3c107WarningC1E
""",
    "huggingface_hub": """
  File ".../accelerate/checkpointing.py", line 24
ImportError: cannot import name 'split_torch_state_dict_into_shards' from 'huggingface_hub' (/usr/lib/python3.10/site-packages/huggingface_hub/__init__.py)
""",
    "NumPy 2": """
A module that was compiled using NumPy 1.x cannot be run in NumPy 2.1.3 as it may crash.
To support both 1.x and 2.x versions of NumPy, modules must be compiled with NumPy 2.0.
""",
    "old transformers": """
  File ".../transformers/models/auto/configuration_auto.py", line 1039, in from_pretrained
    config_class = CONFIG_MAPPING[config_dict["model_type"]]
KeyError: 'qwen2'
""",
    "remote code": """
ValueError: Loading Qwen/Qwen-1_8B-Chat-Int4 requires you to execute the configuration file in that repo on your local machine. Make sure you have read the code there.
""",
    "pip's own rule": """
root@wsl:~# pip install deepspeed
error: externally-managed-environment
""",
    "hashes": """
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions, please update the hashes.
""",
    "CUDA compiler": """
      raise MissingCUDAException("CUDA_HOME does not exist, unable to compile CUDA op(s)")
  op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)
""",
    "torch.load": """
  File ".../transformers/trainer.py", line 2405, in _load_rng_state
_pickle.UnpicklingError: Weights only load failed. In PyTorch 2.6, we changed the default value of the `weights_only` argument
""",
    "hub out of reach": """
requests.exceptions.ConnectionError: (MaxRetryError("HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /Qwen/Qwen-7B-Chat-Int4/resolve/main/config.json"))
OSError: We couldn't connect to 'https://huggingface.co' to load this file, couldn't find it in the cached files
""",
    "another Ubuntu's mirror": """
Get:3 http://mirror/ubuntu focal InRelease
E: The repository 'http://mirror/ubuntu lunar Release' does not have a Release file.
N: Updating from such a repository can't be done securely, and is therefore disabled by default.
""",
    "package index out of reach": """
WARNING: Retrying (Retry(total=0)) after connection broken
ERROR: Could not find a version that satisfies the requirement transformers==4.34.1 (from versions: none)
ERROR: No matching distribution found for transformers==4.34.1
""",
    "JSON quotes": """
  File "finetune.py", line 268, in make_supervised_data_module
    train_json = json.load(open(data_args.data_path, "r"))
json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 3 (char 2)
[2024-01-09 20:00:01] [ERROR] [launch.py:321:sigkill_handler] ['python', 'finetune.py'] exits with return code = 1
""",
    "JSON": """
Generating train split: 0 examples [00:00, ? examples/s]
pyarrow.lib.ArrowInvalid: JSON parse error: Missing a comma or '}' after an object member. in row 12
""",
    "encoding": """
    data = json.load(open(path))
UnicodeDecodeError: 'gbk' codec can't decode byte 0xaf in position 42: illegal multibyte sequence
""",
    "GPU memory": """
  0%|          | 0/500 [00:00<?, ?it/s]
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 594.00 MiB (GPU 0; 8.00 GiB total capacity; 6.61 GiB already allocated)
torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:1333, unhandled cuda error
""",
    "memory": """
Loading checkpoint shards:  50%|#####     | 1/2 [00:20<00:20, 20.3s/it]
Killed
""",
    "shared memory": """
ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).
RuntimeError: DataLoader worker (pid 211) is killed by signal: Bus error.
""",
    "disk": """
  File ".../torch/serialization.py", line 850, in _save
OSError: [Errno 28] No space left on device
""",
    "permissions": """
Saving model checkpoint to output_qwen/checkpoint-500
PermissionError: [Errno 13] Permission denied: 'output_qwen/checkpoint-500/adapter_model.safetensors'
""",
    "old driver": """
RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver
""",
    "card too new": """
NVIDIA GeForce RTX 5070 with CUDA capability sm_120 is not compatible with the current PyTorch installation.
RuntimeError: CUDA error: no kernel image is available for execution on the device
""",
    "driver updated": "\nFailed to initialize NVML: Driver/library version mismatch\n",
    "torch without CUDA": """
  File ".../torch/cuda/__init__.py", line 289, in _lazy_init
AssertionError: Torch not compiled with CUDA enabled
""",
    "container without a card": """
docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].
""",
    "GPTQ on the CPU": "\nRuntimeError: GPU is required to quantize or run quantize model.\n",
    "half on the CPU": "\nRuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'\n",
    "bf16": """
ValueError: Your setup doesn't support bf16/gpu. You need torch>=1.10, using Ampere GPU with cuda>=11.0
""",
    "Docker's socket": """
permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: connect: permission denied
""",
    "Docker not running": """
Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?
""",
    "program not in the image": "\nroot@0f12:/data# gedit train.json\nbash: gedit: command not found\n",
    "checkpointing": """
    loss.backward()
RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn
""",
    "merge refused": "\nValueError: Cannot merge LORA layers when the model is gptq quantized\n",
    "no effect": """
{'loss': 0.0, 'learning_rate': 0.0003, 'epoch': 0.05}
{'loss': 0.0, 'learning_rate': 0.0003, 'epoch': 0.1}
""",
    "targets": "\nValueError: Target modules ['c_attn', 'c_proj', 'w1', 'w2'] not found in the base model.\n",
    "damaged weights": """
safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge
""",
    "files after merging": """
OSError: /models/merged does not appear to have a file named tokenization_qwen.py. Checkout 'main' for available files.
""",
    "NCCL": """
[rank1]: torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, internal error
""",
    "port": """
RuntimeError: The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use).
""",
}

SOUND = {
    "the stock recipe": """
.../transformers/utils/generic.py:441: FutureWarning: `torch.utils._pytree._register_pytree_node` is deprecated.
CUDA extension not installed.
[2025-01-01 00:00:00,000] [INFO] [real_accelerator.py:222:get_accelerator] Setting ds_accelerator to cuda (auto detect)
Warning: import flash_attn rotary fail, please install FlashAttention rotary to get higher efficiency
Warning: import flash_attn rms_norm fail, please install FlashAttention layer_norm to get higher efficiency
{'loss': 1.8234, 'learning_rate': 0.0003, 'epoch': 0.1}
{'loss': 1.4021, 'learning_rate': 0.00028, 'epoch': 0.2}
{'train_runtime': 512.1, 'train_loss': 1.55, 'epoch': 1.0}
""",
    "this program": """
base: Qwen-1_8B-Chat-Int4 in models/Qwen-1_8B-Chat-Int4; run: runs/first
device: NVIDIA H100, bfloat16 (chosen for this device), ZeRO 2
100 steps, 1 epochs
runs/first/adapter is complete. Next: make compare RUN=first
""",
    "a long text": "Token indices sequence length is longer than the specified maximum sequence length (9000 > 8192).\n",
    "pip as root": """
WARNING: Running pip as the 'root' user can result in broken permissions and conflicting behaviour
Successfully installed deepspeed-0.16.9
""",
    "answers about errors": """
question: What does CUDA out mean, and why was my process killed by the teacher?
answer: Your process was stopped. The disk is not full, permission is yours, and the error is gone.
{'loss': 0.0123, 'learning_rate': 1e-05, 'epoch': 3.0}
""",
    "a restart": "checkpoint step-40 is damaged and not used; continuing from step-20.\nstep 21 of 100 loss 1.2\n",
    "peft": "trainable params: 53,673,984 || all params: 1,890,502,656 || trainable%: 2.839\n",
    "NCCL's own notes": """
NCCL INFO Bootstrap : Using eth0:172.17.0.2<0>
NCCL INFO NET/Plugin: No plugin found (libnccl-net.so)
NCCL INFO Channel 00/24 : 0 1
""",
    "apt": "Reading package lists...\nGet:1 http://mirror/ubuntu jammy InRelease [270 kB]\nSetting up gcc (4:11.2.0) ...\n",
    "a progress bar": "\r  0%|          | 0/10 [00:00<?, ?it/s]\r100%|##########| 10/10 [00:09<00:00,  1.0it/s]\n",
    "an empty file": "",
    "numbers that look like errors": "step 137 loss 0.9\nexit code 0\nstep 13 loss 2.0\nstatus 0, 137 tokens\n",
}


@pytest.mark.parametrize("name", FAILED)
def test_a_failure_is_explained_by_its_cause_alone(name: str) -> None:
    found = explain_log(FAILED[name])
    assert [explanation.name for explanation in found] == [name]
    assert found[0].cause
    assert found[0].remedy
    assert found[0].text in FAILED[name].splitlines()[found[0].line - 1] + "…"


def test_every_known_failure_has_a_log() -> None:
    assert {failure.name for failure in FAILURES} == set(FAILED)
    assert len(FAILED) >= 25


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_has_no_failure(name: str) -> None:
    assert explain_log(SOUND[name]) == []


def test_all_logs_in_one_are_explained_one_by_one() -> None:
    """But for those whose cause stands beside them."""
    names = {explanation.name for explanation in explain_log("\n".join([*SOUND.values(), *FAILED.values()]))}
    assert set(FAILED) - names == {"NCCL", "JSON", "disk", "memory", "MPI compiler", "permissions"}


def test_an_unknown_failure_shows_its_last_error() -> None:
    log = "Traceback (most recent call last):\n  File 'x.py', line 1\nRuntimeError: first\nNewError: \x1b[31mlast\x1b[0m\n"
    (found,) = explain_log(log)
    assert (found.name, found.line, found.text, found.cause) == ("unknown", 4, "NewError: last", "")


def test_a_log_of_colours_and_overwritten_lines_is_read() -> None:
    log = "\r 10%|#   |\r 20%|##  |\x1b[1;31mtorch.cuda.OutOfMemoryError: CUDA out of memory.\x1b[0m"
    assert [(e.name, e.text) for e in explain_log(log)] == [
        ("GPU memory", "20%|##  |torch.cuda.OutOfMemoryError: CUDA out of memory.")
    ]
