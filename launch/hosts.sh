#!/usr/bin/env bash
# Train a recipe on plain hosts, from one of them or from anywhere that can ssh to all:
#   launch/hosts.sh hosts.txt recipes/llama2-7b-postshare-30.yaml train.steps=1000
# hosts.txt names one host a line, the main one first; every host sees this checkout at this path.
#   LAUNCH_FILE=launch/accelerate/zero2.yaml   how the training is spread (zero3.yaml)
#   PROCESSES_PER_NODE=4                       processes on each host (8)
#   PORT=29500                                 on the main host
#   REMOTE="ssh -o BatchMode=yes"              runs a command line on a host
# Ctrl-C or SIGTERM here, a lost connection, or a host that fails: the others save and stop. The
# same command goes on from the last checkpoint. See docs/clusters.md.
set -euo pipefail
(($# >= 2)) || { echo "usage: launch/hosts.sh HOSTS_FILE RECIPE [KEY=VALUE ...]" >&2; exit 2; }
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$1")
((${#hosts[@]})) || { echo "error: $1 names no host; write one a line" >&2; exit 2; }
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra remote <<<"${REMOTE:-ssh -o BatchMode=yes -o ServerAliveInterval=15}"
launch=(
  accelerate launch
  --config_file "${LAUNCH_FILE:-launch/accelerate/zero3.yaml}"
  --num_machines "${#hosts[@]}"
  --num_processes "$((${#hosts[@]} * ${PROCESSES_PER_NODE:-8}))"
  --main_process_ip "${hosts[0]#*@}"
  --main_process_port "${PORT:-29500}"
)

# ssh passes no signals on. A host's launcher is told to stop when its standard input ends: it is
# this pipe, and ends when this script closes it, is killed, or cannot be reached any longer.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 9<>"$pipe" 8<"$pipe"
rm "$pipe"
for rank in "${!hosts[@]}"; do
  # -m train: of this checkout, which need not be installed there.
  printf -v command '%q ' "${launch[@]}" --machine_rank "$rank" -m train "$@"
  printf -v script '%s\n' \
    "cd $(printf %q "$PWD") && [ ! -d .venv/bin ] || PATH=\$PWD/.venv/bin:\$PATH" \
    "exec 3<&0" \
    "$command </dev/null 3<&- & launcher=\$!" \
    "{ read -r _ <&3; kill -TERM \$launcher; } 2>/dev/null & watch=\$!" \
    "wait \$launcher; status=\$?" \
    "kill \$watch 2>/dev/null" \
    "exit \$status"
  "${remote[@]}" "${hosts[rank]}" "$script" <&8 8<&- 9>&- &
done
signals=0
trap 'signals=$((signals + 1)); exec 9>&-' INT TERM

status=0
left=${#hosts[@]}
while ((left)); do
  before=$signals ended=0
  wait -n || ended=$?
  if ((signals > before)); then continue; fi # a signal ended the wait, not a host
  left=$((left - 1))
  if ((ended && !status)); then
    status=$ended
    exec 9>&- # the others wait for one that is gone
  fi
done
exit "$status"
