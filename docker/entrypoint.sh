#!/usr/bin/env bash
# The image's entry: checks what the verb will need (data readable, models and runs writable for this user, a GPU that
# this image can use), each with its remedy, then hands over to `python -m train VERB key=value ...`. Keys may be in
# capitals, as for make: DATA=x is data=x.
#   ACCELERATOR=gpu   refuse to start without a GPU        cpu   hide it        auto (default)   take what is there
#   KEEP=no           write to folders that are no mount, and vanish with the container
# `bash`, `sh` and `python` as the first word are these programs.
set -Eeuo pipefail

work=${WORK_DIR:-/workspace} # tests have another
mounts=${MOUNTS:-/proc/self/mountinfo}
[ -z "${WORK_DIR:-}" ] || mounts=${MOUNTS:-}
table=${APP_DIR:-/app}/train/verbs.txt
problems=()
words=()

problem() { problems+=("$1"$'\n'"Remedy: $2"); }

# lower WORD ...: DATA=x is data=x; FROM= is from_run=; values, and words without =, stay as they are
lower() {
    local word key
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

# elsewhere KEY: the person names another place than the usual one, which is then not ours to check
elsewhere() {
    local word
    for word in "${words[@]}"; do
        if [[ $word == "$1="* && ${word#*=} != "$1"/* && ${word#*=} != "$work/$1"/* ]]; then return 0; fi
    done
    return 1
}

# folder KEY: where the command writes: what the person names, else the usual one
folder() {
    local word found=$work/$1
    for word in "${words[@]}"; do [[ $word != "$1="* ]] || found=${word#*=}; done
    realpath -m -- "$found"
}

# kept PATH: does what is written there outlive the container? Not on its own disk (/), nor in memory (tmpfs).
kept() {
    local point best='' kind best_kind='' rest
    while read -r _ _ _ _ point rest; do
        kind=${rest##* - }
        point=$(printf %b "$point") # a blank is written as \040
        if [[ $1/ == "${point%/}"/* && ${#point} -ge ${#best} ]]; then best=$point best_kind=${kind%% *}; fi
    done <"$mounts"
    [[ $best != / && $best_kind != tmpfs ]]
}

lasting() {
    local path
    [ -r "$mounts" ] || return 0
    path=$(folder "$1")
    kept "$path" && return
    [ "${KEEP:-}" != no ] || { echo "$path is no mount: what is written there vanishes with the container (KEEP=no)." >&2 && return; }
    problem "$path is no mount: what is written there would vanish with the container." "-v \"\$PWD/$1:$work/$1\"; or -e KEEP=no, to try something out"
}

# owner: the words for --user that make a container's program you. Under a rootless engine that is uid 0, which the map
# of uids shows: 0 is one uid of the host, other than 0.
owner() {
    local first outside count
    read -r first outside count <"${UID_MAP:-/proc/self/uid_map}" || true
    # shellcheck disable=SC2016  # the person's shell expands it
    if [ "$first $count" = "0 1" ] && [ "$outside" != 0 ]; then echo 0:0; else echo '"$(id -u):$(id -g)"'; fi
}

readable() {
    local path=$work/$1
    [ ! -d "$path" ] || { [ -r "$path" ] && [ -x "$path" ]; } ||
        problem "$path is not readable for user $(id -u)." "on the host: chmod -R a+rX $1; or run as its owner: --user $(owner)"
}

# By writing: a read-only mount, a full disk and another owner all leave the permission bits as they were.
writable() {
    local path=$work/$1 probe
    if probe=$(mktemp -p "$path" .probe-XXXXXX 2>&1); then rm -f "$probe" && return; fi
    if [[ $probe == *"Read-only file system"* ]]; then
        problem "$path is mounted read-only." "mount it without :ro: -v \"\$PWD/$1:$path\""
        return
    fi
    problem "$path is not writable for user $(id -u)." "mount a folder of yours and run as yourself: -v \"\$PWD/$1:$path\" --user $(owner); is the disk full?"
}

# writable_tmp: HOME and every cache are there
writable_tmp() {
    local probe
    if probe=$(mktemp 2>/dev/null); then rm -f "$probe" && return; fi
    problem "${TMPDIR:-/tmp} is not writable." "--read-only needs --tmpfs /tmp:exec,mode=1777 beside it"
}

# Triton's own ptxas is of CUDA 12.8, and a driver before 525 does not load what it makes. The image for CUDA 11.8 has
# 11.8's beside it, and it must be taken there and nowhere else: it does not know sm_90a, which Triton asks for on
# Hopper. So the driver decides, here, at the start; set in the image, it would break every Hopper card.
choose_ptxas() {
    local driver ptxas
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$' | sort -V | head -n 1) || return 0
    ptxas=$(find "${VIRTUAL_ENV:-/opt/venv}"/lib/python3*/site-packages/nvidia/cuda_nvcc/bin/ptxas 2>/dev/null) || return 0
    if [ "${driver%%.*}" -lt 525 ]; then export TRITON_PTXAS_PATH=${TRITON_PTXAS_PATH:-$ptxas}; fi
}

gpu() {
    case ${ACCELERATOR:-auto} in
        cpu) export CUDA_VISIBLE_DEVICES='' && return ;;
        gpu) python -c 'from train.host.checks import must_have_card; must_have_card()' || exit ;;
    esac
    choose_ptxas
}

# check VERB: as the verb table has it. What the program only may write, and an unknown verb, it reports itself.
check() {
    local name data models runs gpu
    while read -r name data models runs gpu _; do [ "$name" != "$1" ] || break; done <"$table"
    [ "$name" = "$1" ] || return 0
    writable_tmp
    [ "$1" != demo ] || KEEP=no # what it shows is enough for a first look
    [ "$data" != read ] || elsewhere data || readable data
    [ "$data" != write ] || writable data
    [ "$data" != write ] || { lasting data && writable data; }
    [ "$models" != read ] || elsewhere models || readable models
    [ "$models" != write ] || elsewhere out || { lasting models && { elsewhere models || writable models; }; }
    [ "$runs" != write ] || { lasting runs && { elsewhere runs || writable runs; }; }
    if [ ${#problems[@]} -gt 0 ]; then
        printf 'error: %s\n' "${problems[@]}" >&2
        exit 2
    fi
    [ "$gpu" = - ] || gpu
}

# Plain `docker run` has a time limit of its own: compose.yaml has five minutes.
note_stop() {
    [ "$1" = train ] && [ "${COMMANDS_AS:-}" = docker ] || return 0
    echo "docker stop kills after 10 seconds, unless this container was started with --stop-timeout 300: a step in hand and its checkpoint may take longer." >&2
}

main() {
    local verb=${1:-help}
    case $verb in bash | sh | python) exec "$@" ;; esac
    [ $# -eq 0 ] || shift
    lower "$@"
    case " ${words[*]-} " in *" --help "* | *" -h "* | *" help "*) ;; *) check "$verb" && note_stop "$verb" ;; esac
    exec python -m train "$verb" "${words[@]}"
}

main "$@"
