"""People's histories in a database: SQLite or PostgreSQL, by one schema and one code.

What is kept of an item is what the caller gave, and its vector with the name of what made it. A
request reads the newest items of one persona, a range of one index, so nothing is held between
requests: there is no cache to evict and no queue to clean when somebody is erased, and any number
of servers may share one PostgreSQL.

A tenant is who holds an API key. Every function that reads or writes histories takes the tenant,
and none finds another's.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from pplug_jax.data.lamp import Item, date_order
from pplug_jax.errors import InputError

DEFAULT_URL = "sqlite:///pplug.sqlite"
LONGEST_NAME = 256  # characters of a persona's name, an item's id or a tenant's name
PATIENCE = 10.0  # seconds to wait for another writer, or for readers of what is to be erased
MEMORY = (None, "", ":memory:")  # the names of SQLite's databases that no file holds

_metadata = sa.MetaData()
# SQLite numbers rows itself only in columns of this very type.
_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _table(name: str, *columns: Any) -> sa.Table:
    # No number is given twice: what belonged to a persona that is gone never fits another.
    return sa.Table(name, _metadata, *columns, sqlite_autoincrement=True)


_tenants = _table(
    "tenants",
    sa.Column("id", _NUMBER, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
)
_keys = _table(
    "keys",
    sa.Column("id", _NUMBER, primary_key=True),
    sa.Column("tenant", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),  # the key itself is kept nowhere
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("revoked", sa.Float(53)),
)
_personas = _table(
    "personas",
    sa.Column("id", _NUMBER, primary_key=True),
    sa.Column("tenant", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.UniqueConstraint("tenant", "name"),
)
_items = sa.Table(
    "items",
    _metadata,
    sa.Column("persona", sa.ForeignKey("personas.id"), primary_key=True),
    sa.Column("place", _NUMBER, primary_key=True, autoincrement=False),  # in order of arrival
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("dated", sa.Text),  # a key that sorts as the item's date does
    sa.Column("body", sa.Text, nullable=False),  # the item, JSON
    sa.Column("vector", sa.LargeBinary),  # float16
    sa.Column("encoder", sa.Text),  # what made the vector
    sa.UniqueConstraint("persona", "id"),
    sa.Index("items_by_date", "persona", "dated", "place"),
    sa.Index("items_by_encoder", "encoder"),
)
_audit = _table(
    "audit",
    sa.Column("id", _NUMBER, primary_key=True),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("tenant", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("key", _NUMBER),  # who asked; none without keys
    sa.Column("persona", sa.String(64), nullable=False),  # its name's digest
    sa.Column("items", _NUMBER, nullable=False),
)


class StoreUnavailable(InputError):
    """The database cannot be reached or written now; the same call may succeed later."""


class UnknownPersona(InputError):
    """The tenant has no persona of that name."""


class UnknownItem(InputError):
    """The persona has no item of that id."""


class Conflict(InputError):
    """An item's id is taken by one with other content."""


class Key(NamedTuple):
    """An API key as a list shows it, without what is secret.

    Attributes:
        id: its number, by which it is revoked.
        tenant: the tenant's name.
        created: Unix time.
        revoked: Unix time, or None.
    """

    id: int
    tenant: str
    created: float
    revoked: float | None


class Caller(NamedTuple):
    """Who makes a request.

    Attributes:
        tenant: the tenant's number.
        key: the key's number; None where no keys are used.
    """

    tenant: int
    key: int | None = None


class StoredItem(NamedTuple):
    """An item of a history.

    Attributes:
        persona: the persona's number.
        place: its place in the order of arrival.
        body: the item as the caller gave it, JSON.
        vector: (E,) float16, or None if the encoder that was asked for has made none yet.
        dated: whether all of the persona's items have a date.
    """

    persona: int
    place: int
    body: str
    vector: np.ndarray | None = None
    dated: bool = True

    @property
    def item(self) -> Item:
        """The item, without a date that tells nothing."""
        item = json.loads(self.body)
        if not self.dated:
            item.pop("date", None)
        return item


class Added(NamedTuple):
    """What became of items.

    Attributes:
        new: the ids of those that were added.
        known: how many were there already.
    """

    new: list[str]
    known: int


def check_name(name: Any, what: str) -> str:
    """Return a persona's, an item's or a tenant's name if it can be one.

    Raises:
        InputError: it is no text, empty, too long, or has characters that nobody can type.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"{what} must be a text of 1 to {LONGEST_NAME} printable characters, not {name!r:.80}"
        )
    return name


def _date_key(item: Item) -> str | None:
    """Return a text that sorts as `date_order` does: each number behind its length."""
    if item.get("date") is None:
        return None
    return "".join(f"{len(str(number)):03d}{number}" for number in date_order(item))


class Store:
    """The histories of many people.

    Any number of threads may use it at once.

    Args:
        url: of SQLAlchemy: sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE.

    Raises:
        InputError: the URL is wrong.
        StoreUnavailable: the database cannot be reached.
    """

    def __init__(self, url: str = DEFAULT_URL):
        try:
            parsed = sa.make_url(url)
            if parsed.get_backend_name() == "postgresql":
                settings: dict[str, Any] = {"connect_args": {"connect_timeout": int(PATIENCE)}}
            elif parsed.get_backend_name() == "sqlite" and parsed.database not in MEMORY:
                settings = {"connect_args": {"timeout": PATIENCE}}
            else:
                raise sa.exc.ArgumentError("another kind of database")
            # An error shows no value: they are somebody's texts.
            self._engine = sa.create_engine(
                parsed, pool_pre_ping=True, hide_parameters=True, **settings
            )
        except (sa.exc.ArgumentError, ModuleNotFoundError) as error:
            raise InputError(
                f"--store={url}: {error}; give sqlite:///FILE or "
                "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
            ) from error
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._insert = sqlite.insert if self._is_sqlite else postgresql.insert
        if self._is_sqlite:
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._create()

    def _create(self) -> None:
        try:
            with self._writing() as connection:
                _metadata.create_all(connection)
        except (sa.exc.IntegrityError, sa.exc.ProgrammingError):  # another server was quicker
            with self._writing() as connection:
                _metadata.create_all(connection)

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                connection = connection.execution_options(writes=writes)
                with connection.begin():
                    yield connection
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise StoreUnavailable(
                f"the store {self._engine.url.render_as_string()} is not available: {reason}; "
                "try again"
            ) from None

    def _reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return self._transaction(writes=False)

    def _writing(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return self._transaction(writes=True)

    # Tenants and keys

    def tenant(self, name: str) -> int:
        """Return the number of the tenant of this name, who is made if need be."""
        check_name(name, "a tenant's name")
        with self._writing() as connection:
            new = self._insert(_tenants).values(name=name).on_conflict_do_nothing()
            connection.execute(new)
            return connection.scalar(sa.select(_tenants.c.id).where(_tenants.c.name == name)) or 0

    def create_key(self, tenant: str) -> str:
        """Make an API key of the tenant, who is made if need be, and return it this one time."""
        owner, secret = self.tenant(tenant), secrets.token_urlsafe(32)
        with self._writing() as connection:
            values = {"tenant": owner, "digest": _digest(secret), "created": time.time()}
            result = connection.execute(_keys.insert().values(values))
            (number,) = result.inserted_primary_key or (0,)
        return f"pplug-{number}-{secret}"

    def all_keys(self) -> list[Key]:
        """Return all keys, the oldest first."""
        columns = _keys.c.id, _tenants.c.name, _keys.c.created, _keys.c.revoked
        with self._reading() as connection:
            rows = connection.execute(sa.select(*columns).join(_tenants).order_by(_keys.c.id))
            return [Key(*row) for row in rows]

    def revoke_key(self, number: int) -> None:
        """Make a key useless from now on.

        Raises:
            InputError: there is none of this number, or it is revoked already.
        """
        with self._writing() as connection:
            change = (
                _keys.update()
                .where(_keys.c.id == number, _keys.c.revoked.is_(None))
                .values(revoked=time.time())
            )
            if not connection.execute(change).rowcount:
                raise InputError(f"there is no key {number} in use; `keys list` shows all")

    def caller(self, key: str) -> Caller | None:
        """Return whose key this is, or None if it is nobody's."""
        _, _, rest = key.partition("pplug-")
        number, _, secret = rest.partition("-")
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            return None
        with self._reading() as connection:
            row = connection.execute(
                sa.select(_keys.c.tenant, _keys.c.digest).where(
                    _keys.c.id == int(number), _keys.c.revoked.is_(None)
                )
            ).first()
        if row is None or not hmac.compare_digest(row.digest, _digest(secret)):
            return None
        return Caller(row.tenant, int(number))

    def has_keys(self) -> bool:
        """Return whether any key was ever made: to revoke the last one lets nobody in."""
        with self._reading() as connection:
            return connection.scalar(sa.select(_keys.c.id).limit(1)) is not None

    # Personas

    def put_persona(self, tenant: int, name: str) -> bool:
        """Make a persona without items; return False if it is there already."""
        check_name(name, "a persona's name")
        with self._writing() as connection:
            new = self._insert(_personas).values(tenant=tenant, name=name)
            made = new.on_conflict_do_nothing().returning(_personas.c.id)
            return connection.scalar(made) is not None

    def personas(self, tenant: int, after: str = "", limit: int = 100) -> list[str]:
        """Return the names of the tenant's personas behind `after`, in order, a page of them."""
        with self._reading() as connection:
            page = (
                sa.select(_personas.c.name)
                .where(_personas.c.tenant == tenant, _personas.c.name > after)
                .order_by(_personas.c.name)
                .limit(limit)
            )
            return list(connection.scalars(page))

    def count(self, tenant: int, name: str) -> int:
        """Return how many items a persona has.

        Raises:
            UnknownPersona: the tenant has none of this name.
        """
        with self._reading() as connection:
            persona = self._persona(connection, tenant, name)
            return self._count(connection, persona)

    def erase(self, caller: Caller, name: str) -> int:
        """Erase a persona: every item, vector and name; return the number of items.

        What is erased is also overwritten in SQLite's file and cut out of its log. A row of the
        audit, without content, is written before. Erasing what is not there does nothing else.

        Args:
            caller: who asks.
            name: the persona's name.

        Raises:
            StoreUnavailable: it is not, or not wholly, erased; call again.
        """
        check_name(name, "a persona's name")
        with self._writing() as connection:
            persona = self._find(connection, caller.tenant, name)
            count = 0 if persona is None else self._count(connection, persona)
            row = {
                "at": time.time(),
                "tenant": caller.tenant,
                "key": caller.key,
                "persona": _digest(name),
                "items": count,
            }
            connection.execute(_audit.insert().values(row))
        with self._writing() as connection:
            persona = self._find(connection, caller.tenant, name, lock=True)
            if persona is not None:
                gone = connection.execute(_items.delete().where(_items.c.persona == persona))
                count = gone.rowcount
                connection.execute(_personas.delete().where(_personas.c.id == persona))
        self._forget()
        return count

    def audit(self, tenant: int) -> list[Mapping[str, Any]]:
        """Return the tenant's erasures, the oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                sa.select(_audit).where(_audit.c.tenant == tenant).order_by(_audit.c.id)
            )
            return [dict(row) for row in rows.mappings()]

    def _find(
        self, connection: sa.Connection, tenant: int, name: str, *, lock: bool = False
    ) -> int | None:
        query = sa.select(_personas.c.id).where(
            _personas.c.tenant == tenant, _personas.c.name == name
        )
        return connection.scalar(query.with_for_update() if lock else query)

    def _persona(
        self, connection: sa.Connection, tenant: int, name: str, *, lock: bool = False
    ) -> int:
        check_name(name, "a persona's name")
        persona = self._find(connection, tenant, name, lock=lock)
        if persona is None:
            raise UnknownPersona(f"there is no persona {name!r}; make it with PUT")
        return persona

    def _count(self, connection: sa.Connection, persona: int) -> int:
        query = sa.select(sa.func.count()).select_from(_items)
        return connection.scalar(query.where(_items.c.persona == persona)) or 0

    # Items

    def add(self, tenant: int, name: str, items: Sequence[Item]) -> Added:
        """Add items behind those that a persona has; the persona is made if need be.

        An item's `id` tells it from others: one that is there already, with the same content, is
        not added again, so that a call may be repeated. An item without gets one.

        Args:
            tenant: the tenant.
            name: the persona's name.
            items: the items, checked by their task.

        Raises:
            Conflict: an item with this id has other content; nothing was added.
            InputError: an id or the name cannot be one.
        """
        rows: dict[str, dict[str, Any]] = {}
        for item in items:
            given = item.get("id")
            id = secrets.token_hex(16) if given is None else str(given)
            check_name(id, "an item's id")
            row = _row(item | {"id": id})
            if rows.setdefault(id, row) != row:
                raise Conflict(f"the id {id!r} is given to two items; ids must be unique")
        check_name(name, "a persona's name")
        with self._writing() as connection:
            made = self._insert(_personas).values(tenant=tenant, name=name)
            connection.execute(made.on_conflict_do_nothing())
            # Whoever adds to a persona holds its row: so places and ids are given once.
            persona = self._persona(connection, tenant, name, lock=True)
            known = dict(
                connection.execute(
                    sa.select(_items.c.id, _items.c.body).where(
                        _items.c.persona == persona, _items.c.id.in_(rows)
                    )
                ).all()
            )
            for id, body in known.items():
                if rows[id]["body"] != body:
                    raise Conflict(
                        f"an item {id!r} is there with other content; correct it with PUT, or give "
                        "this one another id"
                    )
            last = connection.scalar(
                sa.select(sa.func.max(_items.c.place)).where(_items.c.persona == persona)
            )
            new = [row for id, row in rows.items() if id not in known]
            for place, row in enumerate(new, (last or 0) + 1):
                row |= {"persona": persona, "place": place}
            if new:
                connection.execute(_items.insert(), new)
        return Added([row["id"] for row in new], len(known))

    def replace(self, tenant: int, name: str, id: str, item: Item) -> None:
        """Correct an item, which keeps its place in order.

        Raises:
            UnknownPersona: the tenant has none of this name.
            UnknownItem: the persona has none of this id.
        """
        with self._writing() as connection:
            persona = self._persona(connection, tenant, name, lock=True)
            values = _row(item | {"id": id}) | {"vector": None, "encoder": None}
            change = _items.update().where(_items.c.persona == persona, _items.c.id == id)
            if not connection.execute(change.values(values)).rowcount:
                raise _unknown_item(name, id)
        self._forget()

    def remove(self, tenant: int, name: str, id: str) -> None:
        """Erase one item.

        Raises:
            UnknownPersona: the tenant has none of this name.
            UnknownItem: the persona has none of this id.
        """
        with self._writing() as connection:
            persona = self._persona(connection, tenant, name, lock=True)
            gone = _items.delete().where(_items.c.persona == persona, _items.c.id == id)
            if not connection.execute(gone).rowcount:
                raise _unknown_item(name, id)
        self._forget()

    def item(self, tenant: int, name: str, id: str) -> Item:
        """Return an item.

        Raises:
            UnknownPersona: the tenant has none of this name.
            UnknownItem: the persona has none of this id.
        """
        with self._reading() as connection:
            persona = self._persona(connection, tenant, name)
            body = connection.scalar(
                sa.select(_items.c.body).where(_items.c.persona == persona, _items.c.id == id)
            )
        if body is None:
            raise _unknown_item(name, id)
        return json.loads(body)

    def page(self, tenant: int, name: str, after: int = 0, limit: int = 100) -> list[StoredItem]:
        """Return a persona's items behind the place `after`, in order of arrival, without vectors.

        Raises:
            UnknownPersona: the tenant has none of this name.
        """
        with self._reading() as connection:
            persona = self._persona(connection, tenant, name)
            rows = connection.execute(
                sa.select(_items.c.persona, _items.c.place, _items.c.body)
                .where(_items.c.persona == persona, _items.c.place > after)
                .order_by(_items.c.place)
                .limit(limit)
            )
            return [StoredItem(*row) for row in rows]

    def export(self, tenant: int, name: str) -> Iterator[str]:
        """Yield a persona's items as JSON lines, which `read_lines` reads, some at a time.

        Raises:
            UnknownPersona: the tenant has none of this name.
        """
        page = self.page(tenant, name, limit=1000)
        while page:
            yield "".join(stored.body + "\n" for stored in page)
            page = self.page(tenant, name, page[-1].place, limit=1000)

    def newest(
        self, tenant: int, name: str, count: int, encoder: str, *, by_date: bool = True
    ) -> list[StoredItem]:
        """Return the newest items of a persona, the oldest of them first.

        As in training, they are in the order of their dates if all of the persona's items have
        one, and otherwise in order of arrival.

        Args:
            tenant: the tenant.
            name: the persona's name.
            count: the most items.
            encoder: whose vectors are wanted; what another made is left out.
            by_date: `config.data.sort_by_date`.

        Raises:
            UnknownPersona: the tenant has none of this name.
        """
        with self._reading() as connection:
            persona = self._persona(connection, tenant, name)
            of_persona = _items.c.persona == persona
            undated = connection.scalar(
                sa.select(sa.exists().where(of_persona, _items.c.dated.is_(None)))
            )
            dates = [_items.c.dated] if by_date and not undated else []
            order = [*dates, _items.c.place]
            vector = sa.case((_items.c.encoder == encoder, _items.c.vector))
            rows = connection.execute(
                sa.select(_items.c.persona, _items.c.place, _items.c.body, vector)
                .where(of_persona)
                .order_by(*(column.desc() for column in order))
                .limit(count)
            ).all()
        return [
            StoredItem(of, at, body, made and np.frombuffer(made, np.float16), not undated)
            for of, at, body, made in reversed(rows)
        ]

    # Vectors

    def lacking(self, encoder: str, limit: int) -> list[StoredItem]:
        """Return some items, of any tenant, that have no vector of this encoder yet."""
        lacks = sa.or_(_items.c.encoder.is_(None), _items.c.encoder != encoder)
        with self._reading() as connection:
            columns = _items.c.persona, _items.c.place, _items.c.body
            rows = connection.execute(sa.select(*columns).where(lacks).limit(limit))
            return [StoredItem(*row) for row in rows]

    def put_vectors(self, encoder: str, items: Sequence[StoredItem], vectors: np.ndarray) -> None:
        """Keep the vectors of items; those that were erased or corrected since are passed over.

        Args:
            encoder: what made the vectors.
            items: the items.
            vectors: (n, E), kept as float16.
        """
        change = (
            _items.update()
            .where(
                _items.c.persona == sa.bindparam("of"),
                _items.c.place == sa.bindparam("at"),
                _items.c.body == sa.bindparam("made_of"),
            )
            .values(vector=sa.bindparam("made"), encoder=encoder)
        )
        rows = [
            {"of": item.persona, "at": item.place, "made_of": item.body, "made": vector.tobytes()}
            for item, vector in zip(items, vectors.astype(np.float16), strict=True)
        ]
        rows.sort(key=lambda row: (row["of"], row["at"]))  # two servers lock in one order
        if rows:
            with self._writing() as connection:
                connection.execute(change, rows)

    def _forget(self) -> None:
        """Cut what was erased out of SQLite's log, into which pages are written as they were.

        PostgreSQL's own vacuum and checkpoints do so in their time (docs/serving.md).
        """
        if not self._is_sqlite:
            return
        connection = self._engine.raw_connection()
        try:
            # It waits for readers, as long as a writer for another.
            busy, *_ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"erased, but its log could not be cut: {error}") from None
        finally:
            connection.close()
        if busy:
            raise StoreUnavailable(
                "erased, but requests that read the store keep its log from being cut; try again"
            )


def read_lines(text: str) -> list[Item]:
    """Return the items of JSON lines, such as `Store.export` yields.

    Raises:
        InputError: a line is no JSON object; the message has its number.
    """
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number}: not JSON: {error}") from error
        if not isinstance(item, dict):
            raise InputError(f"line {number}: expected an object, found {type(item).__name__}")
        items.append(item)
    return items


def _row(item: Item) -> dict[str, Any]:
    try:
        body = json.dumps(item, sort_keys=True, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the item {item['id']!r:.80} is no JSON object: {error}") from error
    return {"id": item["id"], "dated": _date_key(item), "body": body}


def _unknown_item(name: str, id: str) -> UnknownItem:
    return UnknownItem(f"the persona {name!r} has no item {id!r:.80}")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _set_up_sqlite(connection: Any, record: Any) -> None:
    del record
    connection.isolation_level = None  # we begin transactions ourselves
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # One that began by reading could not write once another has written.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
