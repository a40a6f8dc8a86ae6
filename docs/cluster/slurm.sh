#!/usr/bin/env bash
# A sweep on a Slurm cluster: one Ray on the nodes of one job. In the root of the source:
# `sbatch docs/cluster/slurm.sh`.
#
# ONCE, on a login node: the source and the environment on a file system that all nodes share (a home folder is one):
#   python3 -m venv ~/.fedsim-uv && ~/.fedsim-uv/bin/pip install uv==0.13.9
#   ~/.fedsim-uv/bin/uv venv --seed --python 3.11 --managed-python ~/fedsim-env
#   ~/fedsim-env/bin/pip install -c constraints.txt -e .
# EVERY TIME: set the lines marked <<<, then for example
#   SUITE=quick OUT=/shared/$USER/quick sbatch docs/cluster/slurm.sh
#   squeue --me; tail -f fedsim-JOBID.log; scancel JOBID
# Submitted again with the same OUT, it goes on where it was. It does so by itself when Slurm takes the nodes away
# (--requeue), and five minutes before its time is up (--signal): at most 10 times.
#
#SBATCH --job-name=fedsim
#SBATCH --output=fedsim-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# <<< --nodes, --cpus-per-task and --gpus-per-node as you need them; --partition, --account and --constraint as your
# site asks. The same model of GPU in all nodes: another model has other bits. The first node computes like the others.

set -euo pipefail

ENV=${ENV:-$HOME/fedsim-env}
SUITE=${SUITE:-quick}
OUT=${OUT:-$PWD/results/$SUITE}  # on the shared file system
WAIT=${WAIT:-300}                # seconds in which all nodes must have joined

# Two jobs on one machine must not meet: ports and folders go by the job's number. 200 ports a job, from 10000 up.
base=$((10000 + SLURM_JOB_ID % 100 * 200))
local_folder=/tmp/fedsim-$SLURM_JOB_ID
common=(
    --object-manager-port=$((base + 1)) --node-manager-port=$((base + 2)) --metrics-export-port=$((base + 3))
    --dashboard-agent-listen-port=$((base + 4)) --dashboard-agent-grpc-port=$((base + 5))
    --runtime-env-agent-port=$((base + 6)) --min-worker-port=$((base + 20)) --max-worker-port=$((base + 199))
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block
)
in_step=(srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1)

# The token of this job alone: a file that only its owner can read, for as long as the job lives. What is handed on is
# the file's name. Other users of the machines can reach Ray's ports, but Ray answers nobody without the token.
mkdir -p "$OUT"
private=$OUT/.slurm-$SLURM_JOB_ID
(umask 077 && mkdir -p "$private" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token

steps=() driver='' again=''

clean_up() {
    status=$?
    trap - EXIT TERM INT USR1
    mapfile -t running < <(jobs -p) # steps of Ray, and the driver if it is still there
    [ ${#running[@]} -eq 0 ] || kill -TERM "${running[@]}" 2> /dev/null || true
    wait
    rm -rf "$private"
    srun --overlap --ntasks-per-node=1 rm -rf "$local_folder" || true
    if [ -n "$again" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
        echo "fedsim: not finished in time; asking Slurm for more"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
stop() { # the driver ends in order, and then the script; before there is a driver, the script ends at once
    [ -n "$driver" ] || exit 143
    kill -TERM "$driver" 2> /dev/null || true
}
trap clean_up EXIT
trap 'again=yes; stop' USR1
trap stop TERM INT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Of several addresses the first: set HEAD_IP if your nodes talk over another.
head_ip=${HEAD_IP:-$("${in_step[@]}" --nodelist="$head" hostname --all-ip-addresses | awk '{print $1; exit}')}
address=$head_ip:$base

"${in_step[@]}" --nodelist="$head" "$ENV/bin/ray" start --head --node-ip-address="$head_ip" --port="$base" \
    --ray-client-server-port=$((base + 7)) --dashboard-host=127.0.0.1 --dashboard-port=$((base + 8)) \
    --temp-dir="$local_folder" "${common[@]}" &
steps+=($!)

joined() { # how many nodes Ray has; 0 while it has no head
    "$ENV/bin/python" -c 'import ray, sys
ray.init(sys.argv[1], logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))' "$address" 2> /dev/null || echo 0
}
wait_for() {
    until [ "$(joined)" -ge "$1" ]; do
        for step in "${steps[@]}"; do
            kill -0 "$step" 2> /dev/null || { echo "fedsim: Ray ended on a node; its words are above" >&2; exit 1; }
        done
        [ "$SECONDS" -lt "$WAIT" ] || { echo "fedsim: fewer than $1 nodes after $WAIT s" >&2; exit 1; }
        sleep 2
    done
}

wait_for 1
for node in "${nodes[@]:1}"; do
    "${in_step[@]}" --nodelist="$node" "$ENV/bin/ray" start --address="$address" "${common[@]}" &
    steps+=($!)
done
wait_for "${#nodes[@]}"

"$ENV/bin/fedsim" doctor --address "$address"

# In the background, so that signals are heard while it runs. A sweep runs what is missing, and goes on with what is not
# finished.
"$ENV/bin/python" benchmarks/sweep.py --suite "$SUITE" --out "$OUT" --address "$address" &
driver=$!
status=0
wait "$driver" || status=$?
if [ -n "$again" ] || [ "$status" -gt 128 ]; then # a signal ended the waiting: the driver may take a while yet
    wait "$driver" || status=$?
fi
exit "$status"
