#!/usr/bin/env bash
# An environment with mergekit alone: bash benchmarks/mergekit_env.sh FOLDER; then export MERGEKIT=FOLDER/bin/python
# constraints.txt holds but for transformers, which mergekit 0.1.5 wants newer or older at its own taste.
set -euo pipefail
python3 -m venv "$1"
grep -E '^(torch|numpy|safetensors|accelerate|huggingface-hub)==' "$(dirname "$0")/../constraints.txt" > "$1/constraints.txt"
"$1/bin/pip" install --quiet -c "$1/constraints.txt" "mergekit==0.1.5"
"$1/bin/python" -c "import mergekit.merge; print('mergekit is ready')"
