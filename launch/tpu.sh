#!/usr/bin/env bash
# shellcheck disable=SC2329 # some functions are called by retry and trap
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
usage: $0 run FLAG... -- --config=... --workdir=gs://... [ARGUMENT...]
       $0 attach|stop|delete FLAG...

A job on Cloud TPU VMs: one host, a slice of several, or several slices.

  --name=NAME              what to call it
  --project=PROJECT        the Google Cloud project
  --zone=ZONE              for example us-west4-a
  --queued                 of a queued resource, which waits until there are machines; without it
                           they are there at once or not at all
  --spot                   queued, on cheaper machines that may be taken away: run then asks for
                           new ones and starts the job again, until it ends by itself
  --tunnel-through-iap     connect through Identity-Aware Proxy
  --gcloud-ssh=FLAG        passed on to gcloud's ssh, for example --ssh-key-file=KEY
  --dry-run                print every command, call none
  --yes                    answer every question with yes

 of run alone:
  --accelerator=TYPE       for example v5litepod-16 (v5e), v6e-8, v5p-16, v4-8
  --slices=N               queued, N slices of that type as one job
  --runtime-version=IMAGE  the machines' image; by default the one for JAX
  --data=gs://BUCKET/DIR   copied to data/ on every worker
  --reserved               on machines of a reservation
  --internal-ips           without external addresses
  --network=NETWORK        by default the one named default
  --subnetwork=SUBNETWORK
  --service-account=EMAIL  of the machines, by default the project's
  --data-disk=source=DISK[,mode=read-only]
                           attached, not mounted; several hosts can only read it
  --labels=KEY=VALUE,...
  --gcloud-create=FLAG     passed on to gcloud's create, for example --tags=TAG
  --gcloud-scp=FLAG        passed on to gcloud's scp, for example --ssh-key-file=KEY

--data-disk and --gcloud-... may be given several times.

run sends the current commit to all workers, installs it there, starts
  python -m pplug_jax.main ARGUMENT...
follows the first one's log and ends with the job's exit status: 0, or that of a worker where it
failed. Where NAME is there already, it is used as it is. Ctrl-C leaves the job running; attach
follows it again. stop has it save a checkpoint and end. delete, also offered at the job's end, ends
the costs.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' project='' zone='' accelerator='' image='' data=''
create_flags=() ssh_flags=() scp_flags=() # passed on to gcloud
slices=1
queued=false
spot=false
reserved=false
tunnel=false
answered=false # the Cloud
exists=false   # something that is charged for
started=false  # the job
pretended=''   # state, in a dry run
status=0       # the job's
label='[a-z][-a-z0-9_]{0,62}=[-a-z0-9_]{0,63}'

set_flag() {
  case $1 in
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --queued) queued=true ;;
    --spot) queued=true spot=true ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --slices=*) queued=true slices=${1#*=} ;;
    --runtime-version=*) image=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --tunnel-through-iap) tunnel=true ssh_flags+=("$1") scp_flags+=("$1") connection+=("$1") ;;
    --reserved) reserved=true create_flags+=("$1") ;;
    --internal-ips) create_flags+=("$1") ;;
    --network=* | --subnetwork=*) of_create "$1" '[a-z0-9][-a-z0-9_.:/]*' default ;;
    --service-account=*)
      of_create "$1" '[-a-z0-9.]+@[-a-z0-9.]+' pplug@my-project.iam.gserviceaccount.com
      ;;
    --data-disk=*)
      of_create "$1" 'source=[^,=]+(,mode=read-(only|write))?' \
        source=projects/my-project/zones/us-west4-a/disks/my-disk,mode=read-only
      ;;
    --labels=*) of_create "$1" "$label(,$label)*" team=research,user=me ;;
    --gcloud-create=*) check_passed "$1" --tags=pplug && create_flags+=("${1#*=}") ;;
    --gcloud-ssh=*)
      check_passed "$1" --ssh-key-file=KEY
      ssh_flags+=("${1#*=}") connection+=("$1")
      ;;
    --gcloud-scp=*) check_passed "$1" --ssh-key-file=KEY && scp_flags+=("${1#*=}") ;;
    *) return 1 ;;
  esac
}

# of_create FLAG=VALUE PATTERN EXAMPLE: one that gcloud's create has by the same name
of_create() {
  check_argument "$@"
  create_flags+=("$1")
}

parse() {
  verb=${1-}
  case $verb in
    run | attach | stop | delete) shift ;;
    --help) ;;
    *) refuse "the first argument should be run, attach, stop or delete, not '$verb'" ;;
  esac
  parse_flags "$@"
  check --name "$name" '[a-z]([-a-z0-9]{0,48}[a-z0-9])?' pplug
  check --project "$project" '([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' my-project
  check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-west4-a
  ! $tunnel || [[ " ${ssh_flags[*]} ${scp_flags[*]} " != *' --internal-ip '* ]] ||
    refuse "--tunnel-through-iap and --internal-ip exclude each other"
  if [[ $verb == run ]]; then check_run; fi
  kind=tpu-vm ready=READY workers=(--worker=all)
  if $queued; then kind=queued-resources ready=ACTIVE workers=(--node=all --worker=all); fi
  where=(--project="$project" --zone="$zone" --quiet)
}

check_run() {
  check --accelerator "$accelerator" 'v(2|3|4|5litepod|5p|6e)-[1-9][0-9]*' v5litepod-16
  check --slices "$slices" '[1-9][0-9]{0,2}' 2
  ! $spot || ! $reserved ||
    refuse "--spot and --reserved exclude each other: spot machines are of no reservation"
  case $accelerator in
    v5litepod-*) : "${image:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${image:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${image:=v2-alpha-tpuv6e}" ;;
    *) : "${image:=tpu-ubuntu2204-base}" ;;
  esac
  check --runtime-version "$image" '[a-z0-9][-a-z0-9.]*' v2-alpha-tpuv5-lite
  [[ -z $data ]] || check --data "$data" 'gs://[a-z0-9][-a-z0-9_.]+(/.*)?' gs://my-bucket/data
  has_argument '--config=?*' || refuse "the job's arguments are missing; for example" \
    "-- --config=configs/lamp5.py --workdir=gs://my-bucket/runs/lamp5"
  if ! has_argument '--workdir=gs://?*'; then
    ! $spot || refuse "with --spot the job goes on from checkpoints that outlive the machines;" \
      "for example -- --workdir=gs://my-bucket/runs/lamp5"
    say "note: without --workdir=gs://... the results lie on the machines, and go with them"
  fi
  ((slices == 1)) || has_argument "--config.mesh.slices=$slices" ||
    say "note: the job must know of the slices, by its config or by --config.mesh.slices=$slices"
}

tpus() { run gcloud compute tpus "$kind" "$@" "${where[@]}"; }

# connect ssh|scp ARGUMENT...; to a TPU VM only alpha's tunnel, to a queued resource any.
connect() {
  local track=(compute)
  if $tunnel && ! $queued; then track=(alpha compute); fi
  run gcloud "${track[@]}" tpus "$kind" "$@" "${where[@]}"
}

# list PRETENDED KIND FIELD FILTER; unlike `describe` it tells none from a failure to ask.
list() {
  query "$1" gcloud compute tpus "$2" list --format="value($3)" --filter="$4" "${where[@]}"
}

# Nothing where there is no $name.
state() {
  if $queued; then
    list "$pretended" queued-resources state.state "name ~ \"(^|/)$name$\""
  else
    list "$pretended" tpu-vm state "name ~ \"(^|/)$name$\" AND NOT queuedResource:*"
  fi
}

# The machines' health: sound, lost or unknown.
health() {
  local now nodes=READY
  if ! now=$(state); then
    echo unknown
  elif [[ $now != "$ready" ]]; then
    echo lost
  elif ! $queued; then
    echo sound
  # A preemption may show in the machines' states before it does in the queued resource's.
  elif ! nodes=$(list READY tpu-vm state "queuedResource ~ \"/$name$\""); then
    echo unknown
  elif grep -qvx READY <<<"${nodes:-READY}"; then
    echo lost
  else
    echo sound
  fi
}

# Both are retried, where `set -e` does not hold: what fails is said to have failed.
create() {
  local options=(--version="$image")
  if $queued; then
    options=(--runtime-version="$image" --node-id="$name")
    if ((slices > 1)); then options=(--runtime-version="$image" --node-count="$slices"); fi
    if $spot; then options+=(--spot); fi
  fi
  options+=(${create_flags[@]+"${create_flags[@]}"})
  exists=true # perhaps, whatever becomes of the command
  tpus create "$name" --accelerator-type="$accelerator" "${options[@]}" || return 1
  pretended=$ready
}

delete() {
  if $queued; then tpus delete "$name" --force; else tpus delete "$name"; fi || return 1
  exists=false
  pretended=''
}

# Returns when there are machines, asked for if need be.
ensure() {
  local now before=''
  while :; do
    # The first answer shows that project, zone and login are right; later failures pass.
    if now=$(state); then answered=true; elif $answered; then now=unknown; else return 1; fi
    [[ -z $now ]] || exists=true
    case $now in
      '')
        [[ -z $before ]] || die "$name was deleted"
        create || return 1
        now=requested
        ;;
      "$ready") return ;;
      FAILED)
        tpus describe "$name" --format='value(state.failedData.error.message)' >&2
        delete # it has no machines, but counts against the quota
        die "the request for $name failed, see above, and was deleted"
        ;;
      SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
        $spot || die "$name has no machines any more (state: $now)"
        retry delete || return 1
        now=''
        ;;
      *)
        [[ $now == "$before" ]] || say "$name: $now; asking again every $poll_seconds s"
        sleep "$poll_seconds"
        ;;
    esac
    before=$now
  done
}

# Of steps that may be repeated; what failed may be the connection alone.
retry() {
  local left=3
  until "$@"; do
    ((--left)) || return 1
    say "that failed; again in $poll_seconds s"
    sleep "$poll_seconds"
  done
}

# on_workers all|0 COMMAND; a dead connection is noticed within minutes.
on_workers() {
  connect ssh "$name" "${workers[@]/%all/$1}" ${ssh_flags[@]+"${ssh_flags[@]}"} \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 --command="$2" </dev/null
}

pack() {
  local changed
  changed=$(git -C "$root" status --porcelain --untracked-files=no)
  [[ -z $changed ]] || die "what is sent is a commit; commit these changes or stash them:
$changed"
  run git -C "$root" archive --format=tar.gz --output="$scratch/pplug.tar.gz" HEAD
}

send() {
  connect scp "$scratch/pplug.tar.gz" "$root/launch/worker.sh" "$name:" "${workers[@]}" \
    ${scp_flags[@]+"${scp_flags[@]}"}
}

install() { on_workers all "bash worker.sh install $(printf %q "$data")" >&2; }

start() { on_workers all "bash worker.sh start$(quoted "${job[@]}")" >&2; }

# The log of worker 0 (of slice 0), each line once. How many were shown is kept in a file, since the
# loop is a process of its own.
follow() {
  local line number seen
  seen=$(<"$scratch/seen")
  on_workers 0 'bash worker.sh follow' | while IFS= read -r line; do
    number=${line%%:*}
    if [[ $number =~ ^[0-9]+$ ]] && ((number > seen)); then
      printf '%s\n' "${line#*:}"
      seen=$number
      echo "$seen" >"$scratch/seen"
    fi
  done
}

# Returns when the job has ended on all workers, with $status 0 if it is on all of them; fails when
# the machines are lost.
watch() {
  local before ended word number host i unreachable=0
  started=true
  while :; do
    before=$(<"$scratch/seen")
    if follow && ended=$(on_workers all 'bash worker.sh wait_for_end'); then
      status=0
      while read -r word number host; do
        [[ $word == status && $number != 0 ]] || continue
        say "$host: the job ended with status $number"
        status=$number
      done <<<"$ended"
      if ! $spot || ((status == 0)); then return; fi
      # A preemption ends the job some time before it shows in the machines' state.
      for ((i = 0; i < 5; i++)); do
        sleep "$poll_seconds"
        [[ $(health) != lost ]] || return 1
      done
      return
    fi
    [[ $(<"$scratch/seen") == "$before" ]] || unreachable=0
    case $(health) in
      lost) return 1 ;;
      # Sound machines so long out of reach are new ones, which do not know of the job.
      sound) ((++unreachable < 5)) || return 1 ;;
    esac
    say "the connection broke, the job goes on; connecting again in $poll_seconds s"
    sleep "$poll_seconds"
  done
}

# After machines were lost: others in their place, where they are spot.
replace() {
  local now
  $started || [[ $(health) == lost ]] || die "the job could not be started, see above"
  now=$(state) || die "the state of $name is unknown"
  [[ -n $now ]] || die "$name was deleted"
  $spot || die "$name has lost the job (state: $now)"
  say "$name was preempted (state: $now); asking for other machines"
  [[ $now == SUSPEND* ]] || retry delete
  started=false
  echo 0 >"$scratch/seen"
  retry ensure
}

finish() {
  if ((status)); then say "The job ended with status $status."; else say "The job has ended."; fi
  if confirm "Delete $name now?"; then delete; fi
  exit "$status"
}

# Says what is left behind, however the launcher ends.
farewell() {
  local now='' flags=(--name="$name" --project="$project" --zone="$zone")
  [[ -z ${scratch-} ]] || rm -rf "$scratch"
  if ! $exists || $dry_run; then return; fi
  if now=$(state) && [[ -z $now ]]; then
    say "Nothing is left of $name."
    return
  fi
  if $queued; then flags+=(--queued); fi
  say "$name (state: ${now:-unknown}) is left, and is charged for while it has machines."
  if $started; then say "To follow the job: $(again attach "${flags[@]}")"; fi
  say "To delete it:      $(again delete "${flags[@]}")"
}

main() {
  parse "$@"
  needs gcloud
  trap farewell EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  scratch=$(mktemp -d)
  echo 0 >"$scratch/seen"
  if [[ $verb == run ]]; then
    pack
    ensure
    until retry send && retry install && start && watch; do replace; done
    finish
  fi

  local now
  pretended=$ready
  now=$(state)
  [[ -n $now ]] || die "there is no $name in $zone of $project, or not of this kind (--queued)"
  exists=true
  if [[ $verb == delete ]]; then
    confirm "Delete $name (state: $now), with what lies on its machines?" || exit 1
    delete
    exit
  fi
  if [[ $verb == stop ]]; then on_workers all 'bash worker.sh stop'; fi
  watch || die "$name has lost the job; run goes on from its last checkpoint"
  finish
}

main "$@"
