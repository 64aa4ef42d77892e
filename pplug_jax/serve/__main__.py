"""The command: `python -m pplug_jax.serve keys create --tenant=NAME`."""

import argparse
import sys
import time
from collections.abc import Sequence

from pplug_jax.errors import InputError
from pplug_jax.runtime.console import say
from pplug_jax.serve.store import DEFAULT_URL, Store


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store",
        default=DEFAULT_URL,
        metavar="URL",
        help="the database: sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE "
        "(%(default)s)",
    )
    top = argparse.ArgumentParser(prog="python -m pplug_jax.serve", description="API keys.")
    keys = top.add_subparsers(dest="command", required=True).add_parser("keys", help="API keys")
    what = keys.add_subparsers(dest="what", required=True)
    create = what.add_parser("create", parents=[shared], help="make a key and show it, once")
    create.add_argument("--tenant", required=True, help="whose personas it reaches")
    what.add_parser("list", parents=[shared], help="show all keys, without their secrets")
    revoke = what.add_parser("revoke", parents=[shared], help="make a key useless")
    revoke.add_argument("number", type=int, help="its number in the list")
    return top


def manage_keys(arguments: argparse.Namespace) -> None:
    """Do what `keys create`, `list` or `revoke` says."""
    store = Store(arguments.store)
    if arguments.what == "create":
        say(store.create_key(arguments.tenant))
    elif arguments.what == "revoke":
        store.revoke_key(arguments.number)
        say(f"key {arguments.number} is revoked")
    else:
        for key in store.all_keys():
            until = "" if key.revoked is None else f", revoked {_date(key.revoked)}"
            say(f"{key.id:4}  {key.tenant}, made {_date(key.created)}{until}")
    store.close()


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        manage_keys(parser().parse_args(arguments))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
