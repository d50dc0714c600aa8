#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
# sbatch configs/slurm.sh configs/cc3m_rn50_declutr_otter.yaml --train-data 'cc3m/{00000..00331}.tar'
# More nodes: lower --batch-size so that the total stays 512. Resubmit to continue a killed run.
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500
recipe=$1
shift
srun python -m otter_openclip.train --config "$recipe" --logs logs --name "$(basename "$recipe" .yaml)" \
    --save-most-recent --resume latest "$@"
