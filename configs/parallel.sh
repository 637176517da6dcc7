#!/bin/bash
# Shards on one machine, so many at a time, by xargs or GNU parallel: parallel.sh scans best.pt out [SHARDS]
# For several GPUs; on a CPU one run uses all cores by itself. Then one tree of all: detxai merge out/* -o whole
set -uo pipefail
scans=${1:?folder of pictures} model=${2:?checkpoint} out=${3:?folder of the trees} shards=${4:-2}

# A shard a GPU; failed images (code 3) do not keep the other shards from being done.
one() {
  CUDA_VISIBLE_DEVICES=$(($5 - 1)) detxai explain "$1" -m "$2" -o "$3/$5" --shard "$5/$4" -q
  code=$?
  [ "$code" = 3 ] || exit "$code"
}
export -f one
if command -v parallel > /dev/null; then
  seq "$shards" | parallel -j "$shards" one "$scans" "$model" "$out" "$shards" {}
else
  seq "$shards" | xargs -P "$shards" -I {} bash -c 'one "$@"' _ "$scans" "$model" "$out" "$shards" {}
fi
