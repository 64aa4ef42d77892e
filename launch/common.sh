# shellcheck shell=bash disable=SC2034
# What the launchers share: messages, dry run, questions. Sourced, not run; bash 3.2 will do.

dry_run=false
yes=false
poll_seconds=${POLL_SECONDS:-30} # between questions and tries
job=() # the arguments that follow --

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# Of a command line that cannot work, before anything is called.
refuse() {
  say "error: $*"
  say "$0 --help tells how it is used"
  exit 2
}

# check FLAG VALUE PATTERN EXAMPLE
check() {
  [[ -n $2 ]] || refuse "$1 is missing; for example $1=$4"
  [[ $2 =~ ^($3)$ ]] || refuse "$1=$2 is malformed; it should look like $1=$4"
}

# parse_flags ARGUMENT...: sets what all launchers have, and by set_flag what one has alone.
parse_flags() {
  while (($#)); do
    case $1 in
      --name=*) name=${1#*=} ;;
      --dry-run) dry_run=true ;;
      --yes) yes=true ;;
      --help)
        usage
        exit
        ;;
      --)
        shift
        job=("$@")
        break
        ;;
      *) set_flag "$1" || refuse "unknown argument $1 (flags are written --name=VALUE)" ;;
    esac
    shift
  done
}

# has_argument PATTERN: of the job
has_argument() {
  local argument
  for argument in ${job[@]+"${job[@]}"}; do
    # shellcheck disable=SC2053 # a pattern
    [[ $argument != $1 ]] || return 0
  done
  return 1
}

show() { printf '+%s\n' "$(printf ' %q' "$@")" >&2; }

run() {
  show "$@"
  $dry_run || "$@"
}

# query PRETENDED COMMAND...: what the command prints; in a dry run PRETENDED.
query() {
  local pretended=$1
  shift
  if $dry_run; then
    show "$@"
    printf '%s\n' "$pretended"
  else
    "$@"
  fi
}

needs() { $dry_run || command -v "$1" >/dev/null || die "$1 is not installed (docs/pods.md)"; }

confirm() {
  local answer=n
  if $yes || $dry_run; then
    say "$1 yes"
    return
  fi
  printf '%s [y/N] ' "$1" >&2
  read -r answer || say ""
  [[ $answer == [yY] ]]
}
