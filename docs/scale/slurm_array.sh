#!/usr/bin/env bash
# A run in shards, one a task of a Slurm array; the last command brings them together.
#
#   job=$(sbatch --parsable --array=1-8 --export=ALL,SHARDS=8 docs/scale/slurm_array.sh)
#   sbatch --dependency=afterok:$job --export=ALL,MERGE=8 docs/scale/slurm_array.sh
#
# A task that failed goes on with the same SHARDS: sbatch --array=3 --export=ALL,SHARDS=8 ...
#
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=4:00:00
#SBATCH --requeue
set -euo pipefail

experiment=${EXPERIMENT:-emotion_conflict}
settings=${SETTINGS:-settings.yaml} # model, device, dtype, recordings: as for one machine
out=${OUT:-runs/array}

if [[ -n ${MERGE:-} ]]; then
    shards=()
    for ((i = 1; i <= MERGE; i++)); do shards+=("$out/$i"); done
    exec hooked-alm merge "${shards[@]}" --out "$out/merged"
fi
# A task that was killed and requeued goes on where it stopped.
exec hooked-alm run "$experiment" --config "$settings" --out "$out/$SLURM_ARRAY_TASK_ID" \
    --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
