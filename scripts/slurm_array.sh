#!/bin/bash
# A benchmark on a cluster: every task of the array takes the next job that no other task has, until none is left.
#
#   sbatch scripts/slurm_array.sh scripts/configs/table1.yaml /path/shared/by/all/nodes/table1
#
# A task that is killed or runs out of time leaves a checkpoint; submit the same line again, and what is not done goes on
# from there. The number of tasks need not match the number of jobs. Without SLURM the script runs as one task:
#
#   bash scripts/slurm_array.sh scripts/configs/table1.yaml out
#
#SBATCH --job-name=hf-sage
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
set -euo pipefail
config=${1:?usage: slurm_array.sh CONFIG.yaml DIR [options of hf-sage benchmark run]}
folder=${2:?usage: slurm_array.sh CONFIG.yaml DIR [options of hf-sage benchmark run]}
exec hf-sage benchmark run "$config" --output-dir "$folder" --workers 1 "${@:3}"
