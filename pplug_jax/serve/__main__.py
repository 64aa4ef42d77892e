"""The commands: `python -m pplug_jax.serve --plug=PLUG`, and `... keys create --tenant=NAME`."""

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pplug_jax.errors import InputError
from pplug_jax.runtime.console import say
from pplug_jax.serve.store import DEFAULT_URL, Store

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _store_argument() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store",
        default=DEFAULT_URL,
        metavar="URL",
        help="the database: sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE "
        "(%(default)s)",
    )
    return shared


def keys_parser() -> argparse.ArgumentParser:
    """Return what reads the command line of `keys`."""
    shared = _store_argument()
    keys = argparse.ArgumentParser(prog="python -m pplug_jax.serve keys", description="API keys.")
    what = keys.add_subparsers(dest="what", required=True)
    create = what.add_parser("create", parents=[shared], help="make a key and show it, once")
    create.add_argument("--tenant", required=True, help="whose personas it reaches")
    what.add_parser("list", parents=[shared], help="show all keys, without their secrets")
    revoke = what.add_parser("revoke", parents=[shared], help="make a key useless")
    revoke.add_argument("number", type=int, help="its number in the list")
    return keys


def server_parser() -> argparse.ArgumentParser:
    """Return what reads the command line of the server."""
    server = argparse.ArgumentParser(
        prog="python -m pplug_jax.serve",
        parents=[_store_argument()],
        description="Answer for people over HTTP. `keys create|list|revoke` manages API keys.",
    )
    server.add_argument(
        "--plug", required=True, help="a run's workdir, or what --mode=export wrote, or a hub id"
    )
    server.add_argument(
        "--llm", help="of an exported plug: its LLM, if its name does not say where"
    )
    server.add_argument("--encoder", help="of an exported plug: its encoder, likewise")
    server.add_argument(
        "--method",
        help="of a run's workdir: which method answers (the first that can be served)",
    )
    server.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    server.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    server.add_argument(
        "--slots", type=int, default=32, help="how many are answered at a time (%(default)s)"
    )
    server.add_argument(
        "--engine", choices=("jax", "vllm"), default="jax", help="what answers (%(default)s)"
    )
    server.add_argument(
        "--engine_url",
        metavar="http://HOST:8000/v1",
        help="of --engine=vllm: the server, started with --enable-prompt-embeds",
    )
    server.add_argument("--no-ui", action="store_true", help="leave the page at / out")
    return server


def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT, and then finish what runs."""
    import uvicorn  # none of these, nor JAX, for keys

    from pplug_jax.runtime.compiled import keep_compiled
    from pplug_jax.serve.app import make_app
    from pplug_jax.serve.build import load_plug, make_service

    if (arguments.engine == "vllm") != (arguments.engine_url is not None):
        raise InputError("--engine=vllm and --engine_url belong together")
    bound = _bound(arguments.host, arguments.port)
    keep_compiled()
    # Before the store, which is made if it is not there.
    personalizer = load_plug(arguments.plug, arguments.llm, arguments.encoder, arguments.method)
    store = Store(arguments.store)
    has_keys, is_local = store.has_keys(), arguments.host in LOOPBACK
    if not has_keys and not is_local:
        raise InputError(
            f"--host={arguments.host}: without any API key the server listens on loopback alone; "
            "make one with `keys create --tenant=NAME`"
        )
    service = make_service(
        Path(arguments.plug).resolve().name,
        personalizer,
        store,
        slots=arguments.slots,
        engine_url=arguments.engine_url,
    )
    if not has_keys:
        say("no API key is in use: whoever is on this machine may ask (`keys create` changes that)")
    say(f"serving {service.name} at http://{arguments.host}:{arguments.port}/v1")
    app = make_app(service, ui=not arguments.no_ui)
    # Its log of requests would name people.
    config = uvicorn.Config(app, access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket at this address, before anything that takes time is done."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise InputError(f"--host={host} --port={port}: {error}; take another") from error
    return bound


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
        given = list(sys.argv[1:] if arguments is None else arguments)
        if given[:1] == ["keys"]:
            manage_keys(keys_parser().parse_args(given[1:]))
        else:
            serve(server_parser().parse_args(given))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
