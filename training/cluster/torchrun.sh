#!/usr/bin/env bash
# Several machines without a scheduler. On every one of them the same command, the first one's address given:
#
#   HEAD=10.0.0.1 NODES=2 GPUS=8 training/cluster/torchrun.sh --config sdxl_full_80gb --train_data_dir MY_PICTURES
#
# The output folder must be on a file system that all machines see. On CPUs: ACCELERATE_USE_CPU=1 and GPUS = processes
# per machine. A process or machine that is lost ends the job on all of them; the same command goes on from there, on
# another number of machines too as long as the pairs in a step stay the same. With RESTARTS=3 in front all processes
# start again by themselves, up to three times, once the machines have found each other again; after a mistake in the
# settings they do so as well, in vain.
set -euo pipefail

: "${HEAD:?the address of the first machine}" "${NODES:?how many machines}" "${GPUS:?GPUs of each machine}"
: "${PORT:=29400}" "${JOB:=spin}" "${SCRIPT:=training/train_spin_sdxl.py}" "${PYTHON:=.venv/bin/python}"
: "${RESTARTS:=0}"

exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$GPUS" \
    --max_restarts "$RESTARTS" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "$JOB" "$SCRIPT" "$@"
