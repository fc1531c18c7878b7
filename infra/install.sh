#!/bin/sh
# Installs the project, every package in the version of constraints.txt. `make install` and the image run these steps:
#   infra/install.sh torch [cpu|cuda]        PyTorch, which is large; cpu: without CUDA's libraries. Default: as on PyPI
#   infra/install.sh project EXTRAS [OPTION…]  all the rest, with these extras and options of `pip install`
# PYTHON: the interpreter to install into.
set -eu
cd "$(dirname "$0")/.."

install() {
    "${PYTHON:-python3}" -m pip install --quiet --constraint constraints.txt "$@"
}

step=$1
shift
case $step in
torch)
    case ${1:-cuda} in
    cpu) install --extra-index-url https://download.pytorch.org/whl/cpu torch ;;
    cuda) install torch ;;
    *) echo "infra/install.sh torch: expected cpu or cuda, found $1" >&2 && exit 2 ;;
    esac
    ;;
project)
    extras=$1
    shift
    install "$@" ".[$extras]"
    ;;
*)
    echo "infra/install.sh: expected torch or project, found $step" >&2
    exit 2
    ;;
esac
