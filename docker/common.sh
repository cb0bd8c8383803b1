# shellcheck shell=bash
# What run, build and bundle share: settings, the name of the image, and .env, which tells a bare `docker compose` the
# same.

say() { echo "$*" >&2; }
fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# verb_row VERB: its line of the verb table, as data, models, runs, gpu, network; fails where there is no such verb
verb_row() {
    local name
    # shellcheck disable=SC2034  # for who calls it
    while read -r name data models runs gpu network _; do [ "$name" != "$1" ] || return 0; done <train/verbs.txt
    return 1
}

verbs() { sed -n 's/^\([a-z]*\) .*/\1/p' train/verbs.txt | tr '\n' ' '; }

# setting NAME: what was typed or exported, else what the last `make image` noted in .env
setting() {
    local typed=${!1:-}
    [ -n "$typed" ] || [ ! -f .env ] || typed=$(sed -n "s/^$1=//p" .env | tail -n 1)
    echo "$typed"
}

version() { sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml; }

# flavour: the build of torch in the image, by TORCH= or else CUDA=
flavour() {
    local wish cuda
    wish=$(setting TORCH) cuda=$(setting CUDA)
    case ${wish:-auto}-${cuda:-11.8} in
    auto-11.8) echo cu118 ;;
    auto-12.8) echo cu128 ;;
    auto-*) fail "CUDA=$cuda: expected 11.8, or 12.8 for cards of the Blackwell generation." ;;
    cu118-* | cu128-* | registry-*) echo "$wish" ;;
    *) fail "TORCH=$wish: expected cu118, cu128 or registry." ;;
    esac
}

# image_name: IMAGE= as typed, else version and flavour, unless .env names the one that was built here
image_name() {
    local name flavour
    name=$(setting IMAGE)
    flavour=$(flavour) || exit
    [ -z "${TORCH:-}${CUDA:-}" ] || name=${IMAGE:-} # another build was asked for: not the one of .env
    echo "${name:-qwen-finetune:$(version)-$flavour}"
}

# source_hash: of everything that the image is built from, but for the base and the packages, which env.lock pins.
# train/README.md is in the image, docker/README.md is not.
source_hash() {
    find train docker env.lock pyproject.toml data/models.lock data/samples \
        \( -name __pycache__ -o -path docker/README.md \) -prune -o -type f -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}

# commit: of this checkout; SOURCE_COMMIT= where git does not see it (docker/in-image)
commit() {
    git rev-parse HEAD >/dev/null 2>&1 || { echo "${SOURCE_COMMIT:-}" && return; }
    echo "$(git rev-parse HEAD)$([ -z "$(git status --porcelain --untracked-files=no)" ] || echo -dirty)"
}

# keeps_both: does the engine keep, and count, an image packed and unpacked?
keeps_both() { docker info --format '{{.DriverStatus}}' 2>/dev/null | grep -q io.containerd.snapshotter; }

digest_of() { docker image inspect --format '{{.Id}}' "$1" 2>/dev/null; }

# fingerprint IMAGE: eight groups to compare by telephone; of its layers and of what a container gets beside them, so it
# is the same on every host, whatever its store
fingerprint() {
    docker image inspect --format '{{.Os}} {{.Architecture}}
{{range .RootFS.Layers}}{{println .}}{{end}}{{with .Config}}user {{.User}}
in {{.WorkingDir}} stop {{.StopSignal}}
{{range .Env}}env {{println .}}{{end}}{{range .Entrypoint}}entry {{println .}}{{end}}{{range .Cmd}}word {{println .}}{{end}}
{{range $k, $v := .Labels}}label {{$k}}={{println $v}}{{end}}{{range $k, $v := .Volumes}}volume {{println $k}}{{end}}
{{range .OnBuild}}on build {{println .}}{{end}}{{with .Healthcheck}}health {{json .}}{{end}}{{end}}' "$1" |
        sha256sum | cut -c1-32 | sed 's/..../& /g; s/ $//'
}

# accelerator: gpu or cpu, as asked; auto: by the host's driver
accelerator() {
    case ${ACCELERATOR:-auto} in
    gpu | cpu) echo "$ACCELERATOR" ;;
    auto)
        # 124: many cards take long to wake up
        timeout 8 nvidia-smi -L >/dev/null 2>&1 || [ $? -eq 124 ] || { echo cpu && return; }
        echo gpu
        ;;
    *) fail "ACCELERATOR=$ACCELERATOR: expected gpu, cpu or auto." ;;
    esac
}

# take_mirror: pip's own setting, which stands in a file that no container sees
take_mirror() {
    [ -z "${PIP_INDEX_URL:-}" ] || return 0
    PIP_INDEX_URL=$(python3 -m pip config get global.index-url 2>/dev/null) || unset PIP_INDEX_URL
    [ -z "${PIP_INDEX_URL:-}" ] || export PIP_INDEX_URL
}

# cuda: that the image's torch is built for
cuda() { case $(flavour) in cu118) echo 11.8 ;; cu128) echo 12.8 ;; *) echo 12.6 ;; esac; }

# project_name: of this checkout, for compose: two on one host do not stop each other's containers
project_name() { echo "qwen-$(printf %s "$PWD" | sha256sum | cut -c1-8)"; }

# rootless: does the engine run as a user? Then uid 0 of a container is that user, every other uid one of nobody's.
rootless() {
    docker info --format '{{.SecurityOptions}}' 2>/dev/null | grep -q name=rootless ||
        [ "$(docker info --format '{{.Host.Security.Rootless}}' 2>/dev/null)" = true ] # podman under docker's name
}

# user_id [-g]: who a container runs as, so that what it writes is yours
user_id() { if rootless; then echo 0; else id "${1:--u}"; fi; }

# selinux: the label that lets a container see a folder, where SELinux is on; empty elsewhere
selinux() { [ "$(getenforce 2>/dev/null)" != Enforcing ] || echo z; }

# write_env IMAGE SOURCE: .env for docker compose; one that a person wrote is left alone
write_env() {
    local mark='# Written by make image; docker compose reads it.' key value
    if [ -f .env ] && [ "$(head -n 1 .env)" != "$mark" ]; then
        say ".env is your own: left alone. docker compose needs IMAGE=$1 USER_ID=$(user_id) GROUP_ID=$(user_id -g) ACCELERATOR=$(accelerator) in it."
        return
    fi
    {
        printf '%s\nIMAGE=%s\nSOURCE=%s\n' "$mark" "$1" "$2"
        echo "COMPOSE_PROJECT_NAME=$(project_name)"
        printf 'USER_ID=%s\nGROUP_ID=%s\nACCELERATOR=%s\n' "$(user_id)" "$(user_id -g)" "$(accelerator)"
        for key in BASE_IMAGE CUDA TORCH CA; do # so that building again after a change of the source builds the same
            value=$(setting "$key")
            [ -z "$value" ] || echo "$key=$value"
        done
    } >.env.new
    mv .env.new .env
}
