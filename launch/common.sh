# shellcheck shell=bash disable=SC2034
# What the launchers share: messages, dry run, questions. Sourced, not run; bash 3.2 will do.

dry_run=false
yes=false
poll_seconds=${POLL_SECONDS:-30} # between questions and tries
job=()        # the arguments that follow --
connection=() # the flags by which a later call reaches the job as well

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

# check_argument FLAG=VALUE PATTERN EXAMPLE
check_argument() { check "${1%%=*}" "${1#*=}" "$2" "$3"; }

# check_passed FLAG=VALUE EXAMPLE: a VALUE that another program is given as a flag
check_passed() { check_argument "$1" '--[a-z][-a-z0-9]*(=.*)?' "$2"; }

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

quoted() { printf ' %q' "$@"; }

# again VERB FLAG...: the command that calls the launcher again
again() { quoted "$0" "$@" ${connection[@]+"${connection[@]}"}; }

show() { printf '+%s\n' "$(quoted "$@")" >&2; }

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
