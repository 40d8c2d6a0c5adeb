#!/usr/bin/env bash
# Every figure that only a GPU can show: benchmarks/gpu.sh PART DIR (gpu.py says more).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
