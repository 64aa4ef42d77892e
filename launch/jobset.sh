#!/usr/bin/env bash
# shellcheck disable=SC2329 # trap calls a function
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
usage: $0 run FLAG... -- --config=... --workdir=gs://... [ARGUMENT...]
       $0 attach|delete FLAG...

A job on TPUs of a GKE cluster, the one that kubectl speaks to, as a JobSet; an XPK cluster will do.

  --name=NAME              what to call it
  --namespace=NAMESPACE    by default the context's
  --context=CONTEXT        of kubectl's configuration, by default the current one
  --kubectl=FLAG           passed on to every kubectl command, for example --kubeconfig=FILE
  --dry-run                print every command and the manifest, call none
  --yes                    answer every question with yes

 of run alone:
  --image=IMAGE            built from launch/Dockerfile
  --accelerator=TYPE       tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice or tpu-v4-podslice
  --topology=TOPOLOGY      of a slice, for example 4x4; its node pool has 4 chips a host
  --slices=N               so many slices as one job
  --spot                   on spot node pools
  --reservation=NAME       on node pools of a reservation
  --node-selector=KEY=VALUE,...
                           on nodes that have these labels, too
  --queue=QUEUE            of Kueue, by default XPK's, multislice-queue
  --priority-class=CLASS
  --service-account=NAME   of Kubernetes, for the pods
  --labels=KEY=VALUE,...   of the JobSet and its pods
  --env=NAME=VALUE         an environment variable
  --secret=SECRET          its keys as environment variables, for example HF_TOKEN
  --volume=CLAIM:PATH[:ro] a persistent volume claim, mounted there; :ro to read only

--kubectl, --env, --secret and --volume may be given several times.

run creates the JobSet, follows the log of its first host, and ends with 0 if the job completed.
Where a host fails or is taken away, the JobSet starts all again by itself. Ctrl-C leaves the job
running; attach follows it again.
END
}

name='' image='' accelerator='' topology=''
kubectl=(kubectl)
slices=1
spot=false
queue=multislice-queue service_account=default priority_class=''
reservation=''
selectors='' labels=''                  # KEY=VALUE,...
env='' env_from='' volumes='' mounts='' # the items of YAML's lists

resource='[a-z0-9]([-.a-z0-9]{0,61}[a-z0-9])?'
label_value='[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?'
label="($resource/)?$label_value=($label_value)?"

set_flag() {
  local value=${1#*=} path read_only=false
  case $1 in
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=true ;;
    --namespace=*) of_kubectl "$1" "$resource" my-team ;;
    --context=*) of_kubectl "$1" '.+' gke_my-project_us-west4_my-cluster ;;
    --kubectl=*)
      check_passed "$1" --kubeconfig=FILE
      kubectl+=("$value") connection+=("$1")
      ;;
    --reservation=*) check_argument "$1" "$label_value" my-reservation && reservation=$value ;;
    --node-selector=*)
      check_argument "$1" "$label(,$label)*" cloud.google.com/gke-nodepool=my-pool
      selectors+=${selectors:+,}$value
      ;;
    --queue=*) check_argument "$1" "$resource" my-queue && queue=$value ;;
    --priority-class=*) check_argument "$1" "$resource" high && priority_class=$value ;;
    --service-account=*) check_argument "$1" "$resource" pplug && service_account=$value ;;
    --labels=*)
      check_argument "$1" "$label(,$label)*" team=research,user=me
      labels+=${labels:+,}$value
      ;;
    --env=*)
      check_argument "$1" '[A-Za-z_][A-Za-z0-9_]*=.*' HF_HUB_OFFLINE=1
      env+="${env:+, }{name: $(yaml "${value%%=*}"), value: $(yaml "${value#*=}")}"
      ;;
    --secret=*)
      check_argument "$1" "$resource" hugging-face
      env_from+="${env_from:+, }{secretRef: {name: $(yaml "$value")}}"
      ;;
    --volume=*)
      check_argument "$1" "$resource:/[-A-Za-z0-9_./]+(:ro)?" data:/home/pplug/data:ro
      path=${value#*:} value=$(yaml "${value%%:*}")
      if [[ $path == *:ro ]]; then read_only=true path=${path%:ro}; fi
      volumes+="${volumes:+, }{name: $value, persistentVolumeClaim: "
      volumes+="{claimName: $value, readOnly: $read_only}}"
      mounts+="${mounts:+, }{name: $value, mountPath: $(yaml "$path"), readOnly: $read_only}"
      ;;
    *) return 1 ;;
  esac
}

# of_kubectl FLAG=VALUE PATTERN EXAMPLE: one that kubectl has by the same name
of_kubectl() {
  check_argument "$@"
  kubectl+=("$1") connection+=("$1")
}

# A string of YAML, its $ twice as Kubernetes would read $(NAME) as a variable's value.
yaml() {
  local string=$1 backslash=$'\\' dollar='$'
  string=${string//"$backslash"/"$backslash$backslash"}
  string=${string//'"'/"$backslash\""}
  string=${string//$'\n'/"${backslash}n"}
  string=${string//$'\r'/"${backslash}r"}
  string=${string//"$dollar"/"$dollar$dollar"}
  printf '"%s"' "$string"
}

# pairs INDENT KEY=VALUE,...: on lines of their own
pairs() {
  local pair IFS=,
  for pair in $2; do
    printf '\n%*s%s: %s' "$1" '' "$(yaml "${pair%%=*}")" "$(yaml "${pair#*=}")"
  done
}

parse() {
  verb=${1-}
  case $verb in
    run | attach | delete) shift ;;
    --help) ;;
    *) refuse "the first argument should be run, attach or delete, not '$verb'" ;;
  esac
  parse_flags "$@"
  # A pod's name adds the slice, the host and a suffix, in 63 characters together.
  check --name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' pplug
  [[ $verb == run ]] || return 0
  check --image "$image" '[a-z0-9][-a-zA-Z0-9_./:@]*' us-docker.pkg.dev/my-project/pplug/pplug:v1
  check --accelerator "$accelerator" 'tpu-(v5-lite-podslice|v6e-slice|v5p-slice|v4-podslice)' \
    tpu-v5-lite-podslice
  check --topology "$topology" '[1-9][0-9]*(x[1-9][0-9]*){1,2}' 4x4
  check --slices "$slices" '[1-9][0-9]{0,2}' 2
  ! $spot || [[ -z $reservation ]] ||
    refuse "--spot and --reservation exclude each other: spot nodes are of no reservation"
  { has_argument '--config=?*' && has_argument '--workdir=gs://?*'; } ||
    refuse "the job's arguments are missing, or lack a workdir that outlives a pod; for example" \
      "-- --config=configs/lamp5.py --workdir=gs://my-bucket/runs/lamp5"
}

manifest() {
  local side chips=1 per_host selectors=$selectors arguments='' argument
  for side in ${topology//x/ }; do chips=$((chips * side)); done
  per_host=$((chips < 4 ? chips : 4))
  if $spot; then selectors+=${selectors:+,}cloud.google.com/gke-spot=true; fi
  if [[ -n $reservation ]]; then
    selectors+=${selectors:+,}cloud.google.com/reservation-name=$reservation
  fi
  for argument in "${job[@]}"; do arguments+="${arguments:+, }$(yaml "$argument")"; done
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$name"
  labels: # Kueue's queue, and XPK's list; they mean nothing to a cluster without
    kueue.x-k8s.io/queue-name: "$queue"
    xpk.google.com/workload: "$name"$(pairs 4 "$labels")
  annotations: # a slice is a node pool, and no two slices share one
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 10
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $((chips / per_host))
          completions: $((chips / per_host))
          backoffLimit: 0 # hosts cannot go on without one another
          template:
            metadata:
              labels:
                xpk.google.com/workload: "$name"$(pairs 16 "$labels")
            spec:
              serviceAccountName: "$service_account"
              priorityClassName: "$priority_class"
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # to save a checkpoint; a spot host gets less
              hostNetwork: true # slices talk over the hosts' network
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology$(pairs 16 "$selectors")
              volumes: [$volumes]
              containers:
                - name: pplug
                  image: $image
                  args: [$arguments]
                  env: [$env]
                  envFrom: [$env_from]
                  volumeMounts: [$mounts]
                  securityContext: # the host's TPU devices are root's
                    privileged: true
                    runAsUser: 0
                  resources:
                    limits:
                      google.com/tpu: $per_host
END
}

# Follows the log until the JobSet has ended; returns 0 if it completed.
watch() {
  local now pod first="jobset.sigs.k8s.io/jobset-name=$name"
  first+=",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  while :; do
    # Of a pod that runs, since one that has ended was followed already.
    if pod=$(query "pod/$name" "${kubectl[@]}" get pods --selector="$first" \
      --field-selector=status.phase=Running --output=name) && [[ -n $pod ]]; then
      run "${kubectl[@]}" logs --follow "$pod" || say "the connection broke, the job goes on"
    fi
    now=$(query Completed "${kubectl[@]}" get jobset "$name" \
      --output='jsonpath={.status.terminalState}') || now=unknown
    case $now in
      Completed) return 0 ;;
      Failed) return 1 ;;
    esac
    sleep "$poll_seconds"
  done
}

farewell() {
  if $dry_run; then return; fi
  say "To follow the job: $(again attach --name="$name")"
  say "To delete it:      $(again delete --name="$name")"
  say "Its node pools are charged for as long as the cluster keeps them."
}

main() {
  parse "$@"
  needs kubectl
  if [[ $verb == delete ]]; then
    confirm "Delete the JobSet $name?" || exit 1
    run "${kubectl[@]}" delete jobset "$name"
    exit
  fi
  if [[ $verb == run ]]; then
    if $dry_run; then manifest; fi
    run "${kubectl[@]}" create --filename=- <<<"$(manifest)"
  fi
  trap farewell EXIT
  trap 'exit 130' INT
  watch
}

main "$@"
