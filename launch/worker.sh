#!/usr/bin/env bash
# shellcheck disable=SC2329 # the last line calls all functions
# Runs on every worker, where tpu.sh copies it: installs the code, starts the job, says how it ends.
# Each verb may be repeated, as gcloud does where a connection broke.
set -euo pipefail
cd

poll_seconds=${POLL_SECONDS:-1}

started() { [[ -s job/pid ]] || { echo "no job was started on $HOSTNAME" >&2 && exit 1; }; }

running() { [[ -s job/pid && ! -e job/status ]] && kill -0 "$(<job/pid)" 2>/dev/null; }

# install [gs://DATA]
install() {
  if running; then
    echo "a job is running; nothing is installed"
    return
  fi
  mkdir -p pplug
  rm -rf pplug/pplug_jax pplug/configs # not data/ and runs/, which an earlier job may have left
  tar -xzf pplug.tar.gz -C pplug
  cd pplug
  # The images' own Python (3.10) is older than JAX asks for; uv brings one.
  python3 -m pip install --quiet --user uv
  [[ -x .venv/bin/python ]] || ~/.local/bin/uv venv --quiet --python=3.12 .venv
  ~/.local/bin/uv pip install --quiet --python=.venv/bin/python -r requirements.txt 'jax[tpu]' gcsfs
  if [[ -n ${1-} ]]; then
    mkdir -p data
    gcloud storage rsync --recursive "$1" data
  fi
}

# start ARGUMENT...: of pplug_jax.main
start() {
  local command
  command=$(printf '%q ' "$@")
  if running; then
    [[ $command == "$(<job/command)" ]] && return
    echo "another job is running here: $(<job/command)" >&2
    return 1
  fi
  mkdir -p job
  rm -f job/status
  printf '%s\n' "$command" >job/command
  # In a session of its own, so that it survives ours, and as a group that one signal reaches.
  setsid bash "$0" job "$@" >job/log 2>&1 </dev/null &
  echo $! >job/pid
}

# The job itself and then its exit status; for `start` alone.
job() {
  local status=0
  trap : TERM # which ends the job with a checkpoint; its status is still to be written
  cd pplug
  .venv/bin/python -u -m pplug_jax.main "$@" || status=$?
  echo "$status" >../job/status.partial
  mv ../job/status.partial ../job/status
}

# The log's lines as they come, until the job has ended; with their numbers, which tell after a
# broken connection what was seen already.
follow() {
  local shown=0 lines alive=true
  started
  while $alive; do
    running || alive=false
    lines=$(wc -l <job/log)
    $alive || lines=$((lines + 1)) # one without an end
    awk -v shown="$shown" -v lines="$lines" \
      'NR > shown && NR <= lines { print NR ":" $0 }' job/log
    shown=$lines
    ! $alive || sleep "$poll_seconds"
  done
}

# "status NUMBER HOST" when the job has ended, and the log's end if it failed.
wait_for_end() {
  local status
  started
  while running; do sleep "$poll_seconds"; done
  # Without a status it was killed, with its shell, or the machine was started anew.
  status=$(cat job/status 2>/dev/null) || status=137
  if ((status)); then
    tail -n 20 job/log | sed "s/^/$HOSTNAME: /" >&2
  fi
  echo "status $status $HOSTNAME"
}

stop() { ! running || kill -TERM -- "-$(<job/pid)"; }

"$@"; exit # read at once, as a later start may replace this file under a running job
