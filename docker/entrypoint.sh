#!/usr/bin/env bash
# The image's entry: checks what the verb will need (data readable, models and runs writable for this user, GPU visible), each with its
# remedy, then hands over to `python -m train VERB key=value ...`. Keys may be in capitals, as in make and compose: DATA=x is data=x.
#   ACCELERATOR=gpu   refuse to start without a GPU        cpu   hide it        auto (default)   take what is there
set -Eeuo pipefail

problems=()

problem() { problems+=("$1"); }

readable() {
    local path=$1
    [ ! -e "$path" ] || [ -r "$path" ] && return
    problem "$path: not readable for uid $(id -u). Remedy: chmod -R a+rX on the host's folder, or --user \"\$(id -u):\$(id -g)\"."
}

# By writing: a read-only mount and another owner both look writable to root's permission bits.
writable() {
    local path=$1 probe
    if probe=$(mktemp -p "$path" .probe-XXXXXX 2>/dev/null); then rm -f "$probe" && return; fi
    problem "$path: not writable for uid $(id -u). Remedy: mount a folder that this user owns (-v \"\$PWD/${path##*/}:$path\" --user \"\$(id -u):\$(id -g)\"), not read-only, on a disk with room."
}

# lower WORD ...: DATA=x is data=x; FROM= is from_run=; values and words without = stay as they are. Into $words.
lower() {
    local word key
    words=()
    for word; do
        case $word in
            [A-Z]*=*)
                key=${word%%=*}
                key=${key,,}
                [ "$key" != from ] || key=from_run
                words+=("$key=${word#*=}") ;;
            *) words+=("$word") ;;
        esac
    done
}

is_flavour() { grep -q "\"torch\": \"$1\"" "${IMAGE_FILE:-/app/image.json}" 2>/dev/null; }

# ask FIELD: of every card, one a line; nothing where no driver answers
ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$' | sort -V || true; }

# Triton's own ptxas is CUDA 12.8's: a driver before 525 cannot load what it makes. CUDA 11.8's can be used there, and only there: it does
# not know sm_90a, which Triton asks for on Hopper. So the driver decides, at the start, and not the image.
choose_ptxas() {
    local driver=$1 ptxas
    ptxas=$(echo /opt/venv/lib/python3*/site-packages/nvidia/cuda_nvcc/bin/ptxas)
    if [ -n "$driver" ] && [ "${driver%%.*}" -lt 525 ] && [ -x "$ptxas" ]; then export TRITON_PTXAS_PATH=${TRITON_PTXAS_PATH:-$ptxas}; fi
}

gpu() {
    if [ "${ACCELERATOR:-auto}" = cpu ]; then
        export CUDA_VISIBLE_DEVICES=''
        return
    fi
    local driver
    driver=$(ask driver_version | head -n 1)
    choose_ptxas "$driver"
    if [ "${ACCELERATOR:-auto}" = gpu ] && [ -z "$driver" ]; then
        problem "no GPU is visible in this container. Remedy: install the NVIDIA driver and the NVIDIA Container Toolkit on the host, restart Docker, and start with --gpus all; or run on the CPU: ACCELERATOR=cpu."
    elif [ -n "$driver" ]; then
        fits "$driver" "$(ask compute_cap | tail -n 1)"
    fi
}

# fits DRIVER CAPABILITY: can this image's CUDA run on the card?
fits() {
    local driver=$1 capability=$2
    if is_flavour cu118; then
        [ "${capability%%.*}" -lt 10 ] 2>/dev/null || [ -z "$capability" ] ||
            problem "this card (compute capability $capability) is newer than CUDA 11.8. Remedy: the image for CUDA 12.8: make image CUDA=12.8."
        [ "${driver%%.*}" -ge 450 ] || problem "driver $driver is older than 450.80.02, which CUDA 11.8 needs. Remedy: a newer driver on the host."
    elif [ "${driver%%.*}" -lt 525 ]; then
        problem "driver $driver is older than 525, which CUDA 12 needs. Remedy: a newer driver on the host, or the image for CUDA 11.8: make image CUDA=11.8."
    fi
}

check() {
    local verb=$1
    case $verb in
        data | train | compare) readable /work/data ;;&
        model | quantize) writable /work/models ;;&
        train | export | compare) writable /work/runs ;;&
        train | export | infer | serve | compare | quantize) readable /work/models && gpu ;;
    esac
}

main() {
    local verb=${1:-help} words
    [ $# -eq 0 ] || shift
    lower "$@"
    case " ${words[*]-} " in *" --help "* | *" -h "* | *" help "*) ;; *) check "$verb" ;; esac
    if [ ${#problems[@]} -gt 0 ]; then
        printf 'error: %s\n' "${problems[@]}" >&2
        exit 2
    fi
    exec python -m train "$verb" "${words[@]}"
}

main "$@"
