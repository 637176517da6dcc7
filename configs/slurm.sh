#!/bin/bash
# A Slurm array of shards, each with a GPU and a tree of its own: sbatch --array=1-16 slurm.sh scans best.pt out
# Run it again and it does what is missing. Then one tree of all: detxai merge out/* -o whole
#SBATCH --job-name=detxai
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=06:00:00
#SBATCH --signal=TERM@60
set -uo pipefail
scans=${1:?folder of pictures} model=${2:?checkpoint} out=${3:?folder of the trees}
shard=${SLURM_ARRAY_TASK_ID:?start it with sbatch --array=1-N} shards=${SLURM_ARRAY_TASK_MAX:?}

# exec: the signal that Slurm sends a minute before the end reaches detxai, which writes its summary and leaves with 143.
exec detxai explain "$scans" -m "$model" -o "$out/$shard" --shard "$shard/$shards" -q
