#!/usr/bin/env bash
# Fails if a generated file differs from what its generator writes now: protobuf stubs, docs/config.md, docs/metrics.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
PYTHON="$python" tools/protos.sh "$out" 2>/dev/null
for file in "$out"/pdserve/v1/*; do
  cmp "$file" "pdserve/v1/$(basename "$file")" || { echo "stubs differ from protos/: run make protos" >&2; exit 1; }
done
"$python" -m service_kit.config_docs > "$out/config.md"
cmp "$out/config.md" docs/config.md || { echo "docs/config.md is stale: python -m service_kit.config_docs > docs/config.md" >&2; exit 1; }
"$python" -m service_kit.metric_docs > "$out/metrics.md"
cmp "$out/metrics.md" docs/metrics.md || { echo "docs/metrics.md is stale: python -m service_kit.metric_docs > docs/metrics.md" >&2; exit 1; }
echo "generated files are current"
