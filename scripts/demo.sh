#!/usr/bin/env bash
# The demo: install what is missing, run the main job on the CPU, and say how long each took.
set -euo pipefail
cd "$(dirname "$0")/.."

begin=$SECONDS
make --no-print-directory install
installed=$SECONDS

# A fresh output directory: a second demo starts from the beginning instead of resuming a finished run.
rm -rf runs/demo
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
    recipes/pretrain.py --config recipes/demo.yaml "$@"
finished=$SECONDS

echo "set-up: $((installed - begin)) s, run: $((finished - installed)) s"
