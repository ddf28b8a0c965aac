#!/usr/bin/env bash
# Everything that this project has to tell about a GPU: right results, time, memory, host waits, the feature cache.
#
#   bash benchmarks/gpu.sh                                      all of it, which takes several minutes
#   bash benchmarks/gpu.sh --parts right,sync --budget 100      some parts, and no case begun after 100 seconds
#   bash benchmarks/gpu.sh --smoke                              the same script with tiny sizes, also on a CPU
#
# Results go to benchmarks/gpu.jsonl (--out), a line each, and what has a line is not run again: call it again until it
# says "done". `python benchmarks/gpu_page.py` then writes them into docs/performance.md. Options: --help.
#
# On a machine with torch, torchvision and no package index, bring what is missing as wheels: on another machine
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
#     transformers==5.23.0 peft==0.21.2 datasets==5.2.0 evaluate==0.4.6 multiprocess==0.70.19 dill==0.4.1 torchao==0.18.0
#
# and then WHEELS=wheels bash benchmarks/gpu.sh: they are installed into a folder of their own, and nothing else changes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/gpu_sh_inductor}
"$python" benchmarks/gpu.py "$@"
