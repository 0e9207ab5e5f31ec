#!/usr/bin/env bash
# The real run: counterpoise restore on SmolLM2-135M-Instruct before and after RSF.
#     experiments/hma/real_run.sh WORK      (WORK as make_post.py left it)
# First at the default --keep-reward 0.95; when no average keeps that much, at 0.7 from the same store of finished pieces.
set -euo pipefail
cd "$1"
run() {
    counterpoise restore pre post -o restored --work restored.work \
        --prompts prompts.jsonl --reward sentiment:reward.csv \
        --abilities "choices:arc_easy.jsonl?limit=150" --abilities "choices:piqa.jsonl?limit=100" \
        --abilities "choices:boolq.jsonl?limit=40" --abilities "continue:lambada_openai.jsonl?limit=150" \
        --abilities "generate:multi30k.jsonl?metric=bleu&limit=40" \
        --prompt-limit 240 --means 0.4,0.6,0.8 --proxy-size 64 --max-new-tokens 32 --dtype float32 --seed 0 "$@"
}
run
[ -e restored ] || run --keep-reward 0.7
