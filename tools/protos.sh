#!/usr/bin/env bash
# Writes the Python stubs of protos/ to OUT (default: the repository root, i.e. pdserve/v1).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" protos/pdserve/v1/*.proto
