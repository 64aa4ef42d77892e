"""People's histories: kept, read, and erased, alike in SQLite and PostgreSQL."""

import itertools
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_jax.data.lamp import by_date
from pplug_jax.errors import InputError
from pplug_jax.serve.__main__ import main
from pplug_jax.serve.store import (
    Caller,
    Conflict,
    Store,
    StoreUnavailable,
    UnknownItem,
    UnknownPersona,
    _date_key,
    read_lines,
)
from tests.support.environment import ROOT
from tests.support.postgres import Postgres

SECRET = "Zanzibar-Quokka-Pangolin"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    name = f"test_{secrets.token_hex(8)}"
    postgres.execute(f"CREATE DATABASE {name}")
    return postgres.url(name)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


@pytest.fixture
def tenant(store: Store) -> int:
    return store.tenant("acme")


def texts(items: Any) -> list[str]:
    return [stored.item["text"] for stored in items]


def item(i: int, **more: Any) -> dict[str, Any]:
    return {"id": str(i), "text": f"text {i}"} | more


def test_items_are_read_newest_last(store: Store, tenant: int) -> None:
    assert store.add(tenant, "ann", [item(i) for i in range(6)]).new == list("012345")
    store.add(tenant, "ann", [item(6)])
    assert texts(store.newest(tenant, "ann", 3, "e")) == ["text 4", "text 5", "text 6"]
    assert texts(store.page(tenant, "ann", limit=2)) == ["text 0", "text 1"]
    last = store.page(tenant, "ann", limit=2)[-1].place
    assert texts(store.page(tenant, "ann", last, limit=2)) == ["text 2", "text 3"]
    assert store.count(tenant, "ann") == 7


def test_dates_order_items_if_all_have_one(store: Store, tenant: int) -> None:
    dates = ["2024-03-01", "2021", "2024", "2023-12-31", 20230101]
    items = [item(i, date=date) for i, date in enumerate(dates)]
    store.add(tenant, "ann", items)
    expected = [each["text"] for each in by_date(items)]
    assert texts(store.newest(tenant, "ann", 9, "e")) == expected
    assert texts(store.newest(tenant, "ann", 2, "e")) == expected[-2:]
    by_arrival = store.newest(tenant, "ann", 2, "e", by_date=False)
    assert texts(by_arrival) == ["text 3", "text 4"]
    assert by_arrival[0].item["date"] == "2023-12-31"
    store.add(tenant, "ann", [item(9)])
    newest = store.newest(tenant, "ann", 2, "e")
    assert texts(newest) == ["text 4", "text 9"]
    assert "date" not in newest[0].item  # the first item of such a history has none to tell
    assert store.item(tenant, "ann", "4")["date"] == 20230101


@given(st.lists(st.integers(0, 10**30) | st.dates().map(str) | st.text("0123-", max_size=9)))
def test_a_dates_key_sorts_as_training_does(dates: list[Any]) -> None:
    items = [{"date": date, "id": i} for i, date in enumerate(dates)]
    assert sorted(items, key=lambda each: _date_key(each) or "") == by_date(items)


def test_adding_twice_adds_once(store: Store, tenant: int) -> None:
    first = store.add(tenant, "ann", [item(0), item(1)])
    again = store.add(tenant, "ann", [item(1), item(2), {"text": "text 1"}])
    assert (first.known, again.known, again.new[0]) == (0, 1, "2")
    assert texts(store.page(tenant, "ann")) == ["text 0", "text 1", "text 2", "text 1"]
    with pytest.raises(Conflict, match="'1' is there with other content; correct it with PUT"):
        store.add(tenant, "ann", [item(7), item(1, text="other")])
    assert store.count(tenant, "ann") == 4  # all or nothing
    with pytest.raises(Conflict, match="'3' is given to two items"):
        store.add(tenant, "ann", [item(3), item(3, text="other")])
    assert store.add(tenant, "ann", [{"id": 5, "text": "a number"}]).new == ["5"]


def test_an_item_is_corrected_and_removed(store: Store, tenant: int) -> None:
    store.add(tenant, "ann", [item(i) for i in range(3)])
    store.put_vectors("e", store.page(tenant, "ann"), np.ones((3, 4)))
    store.replace(tenant, "ann", "1", {"text": "better"})
    newest = store.newest(tenant, "ann", 9, "e")
    assert texts(newest) == ["text 0", "better", "text 2"]
    assert [stored.vector is None for stored in newest] == [False, True, False]
    store.remove(tenant, "ann", "0")
    assert texts(store.page(tenant, "ann")) == ["better", "text 2"]
    for change in (
        lambda: store.replace(tenant, "ann", "7", {"text": ""}),
        lambda: store.remove(tenant, "ann", "7"),
        lambda: store.item(tenant, "ann", "7"),
    ):
        with pytest.raises(UnknownItem, match="'ann' has no item '7'"):
            change()


def test_vectors_are_of_one_encoder(store: Store, tenant: int) -> None:
    store.add(tenant, "ann", [item(i) for i in range(3)])
    lacking = store.lacking("one", 2)
    vectors = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    store.put_vectors("one", lacking, vectors)
    newest = store.newest(tenant, "ann", 9, "one")
    for stored in newest:
        at = next((i for i, each in enumerate(lacking) if each.place == stored.place), None)
        if at is None:
            assert stored.vector is None
        else:
            np.testing.assert_array_equal(stored.vector, vectors[at].astype(np.float16))
    assert len(store.lacking("one", 9)) == 1
    assert len(store.lacking("two", 9)) == 3
    assert [stored.vector for stored in store.newest(tenant, "ann", 9, "two")] == [None] * 3


def test_a_vector_that_comes_too_late_is_passed_over(store: Store, tenant: int) -> None:
    store.add(tenant, "ann", [item(0), item(1)])
    asked = store.lacking("e", 9)
    store.replace(tenant, "ann", "0", {"text": "other"})
    store.remove(tenant, "ann", "1")
    store.put_vectors("e", asked, np.ones((2, 4)))
    assert [stored.vector for stored in store.newest(tenant, "ann", 9, "e")] == [None]
    store.erase(Caller(tenant), "ann")
    store.add(tenant, "ann", [item(5)])
    store.put_vectors("e", asked, np.ones((2, 4)))
    assert [stored.vector for stored in store.newest(tenant, "ann", 9, "e")] == [None]


def test_a_tenant_finds_nothing_of_anothers(store: Store) -> None:
    one, two = store.tenant("one"), store.tenant("two")
    assert store.tenant("one") == one
    store.add(one, "ann", [item(1)])
    assert store.personas(two) == []
    for read in (
        lambda: store.count(two, "ann"),
        lambda: store.page(two, "ann"),
        lambda: store.item(two, "ann", "1"),
        lambda: store.newest(two, "ann", 9, "e"),
        lambda: store.replace(two, "ann", "1", {"text": ""}),
        lambda: store.remove(two, "ann", "1"),
        lambda: list(store.export(two, "ann")),
    ):
        with pytest.raises(UnknownPersona, match="there is no persona 'ann'"):
            read()
    assert store.erase(Caller(two), "ann") == 0
    store.add(two, "ann", [item(1, text="two's")])
    assert texts(store.page(one, "ann")) == ["text 1"]
    assert store.erase(Caller(two), "ann") == 1
    assert store.personas(one) == ["ann"]


def test_keys(store: Store) -> None:
    assert not store.has_keys()
    key, other = store.create_key("acme"), store.create_key("other")
    caller = store.caller(key)
    assert caller == Caller(store.tenant("acme"), 1)
    assert store.caller(other).tenant == store.tenant("other")
    number, secret = key.removeprefix("pplug-").split("-", 1)
    wrong = ["", "pplug", f"pplug-{number}-", f"pplug-2-{secret}", key + "x", key[:-1], "ü" * 9]
    wrong += [f"pplug-²-{secret}", f"pplug-{'9' * 30}-{secret}", f"pplug-{number}-\ud83d"]
    assert [store.caller(each) for each in wrong] == [None] * len(wrong)
    assert [(each.id, each.tenant, each.revoked) for each in store.all_keys()] == [
        (1, "acme", None),
        (2, "other", None),
    ]
    store.revoke_key(1)
    assert store.caller(key) is None
    assert store.has_keys()
    with pytest.raises(InputError, match="there is no key 1 in use; `keys list` shows all"):
        store.revoke_key(1)
    store.revoke_key(2)
    assert store.has_keys()  # a leaked key that is revoked leaves no door open


def test_an_export_can_be_added_again(store: Store, tenant: int) -> None:
    items = [item(i, title="ü\u0000\U0001f600", date=f"20{i % 30:02}") for i in range(2500)]
    for start in range(0, 2500, 500):
        store.add(tenant, "ann", items[start : start + 500])
    lines = "".join(store.export(tenant, "ann"))
    exported = read_lines(lines)
    assert exported == items
    assert store.add(tenant, "ann", exported[:900]) == ([], 900)
    for start in range(0, 2500, 500):
        store.add(tenant, "copy", exported[start : start + 500])
    assert "".join(store.export(tenant, "copy")) == lines


def test_personas_are_listed_in_pages(store: Store, tenant: int) -> None:
    names = sorted(f"person {i:03}" for i in range(25))
    for name in reversed(names):
        assert store.put_persona(tenant, name)
    assert not store.put_persona(tenant, names[0])
    first = store.personas(tenant, limit=20)
    assert first + store.personas(tenant, after=first[-1], limit=20) == names


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb", "a\0b", "\ud83d", None, 7])
def test_names_that_nobody_can_type(tmp_path: Path, name: Any) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store'}")
    tenant = store.tenant("acme")
    for use in (
        lambda: store.put_persona(tenant, name),
        lambda: store.add(tenant, name, [item(0)]),
        lambda: store.erase(Caller(tenant), name),
        lambda: store.tenant(name),
    ):
        with pytest.raises(InputError, match="must be a text of 1 to 256 printable characters"):
            use()
    with pytest.raises(InputError, match="is no JSON object"):
        store.add(tenant, "ann", [{"text": float("nan")}])
    assert store.personas(tenant) == []


def bytes_in(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_erasure_leaves_no_byte(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    tenant = store.tenant("acme")

    def fill(name: str, word: str) -> None:
        # Some fit into a page, some have pages of their own, and vectors lie beside them.
        items = [item(i, text=f"{word} {i} " * 10 ** (i % 4), date=str(i)) for i in range(40)]
        items += [{"id": f"{word} id", "text": "x"}]
        store.add(tenant, name, items)
        page = store.page(tenant, name)
        marks = np.frombuffer(word.encode(), np.float16)
        store.put_vectors(word, page, np.tile(marks, (len(page), 64)))

    fill(f"{SECRET} persona", SECRET)
    fill("ben", "Others-stay-where-they-are")
    assert SECRET.encode() in bytes_in(tmp_path)
    assert store.erase(Caller(tenant, 7), f"{SECRET} persona") == 41
    assert SECRET.encode() not in bytes_in(tmp_path)
    assert store.count(tenant, "ben") == 41
    assert store.erase(Caller(tenant, 7), f"{SECRET} persona") == 0
    assert [(row["key"], row["items"]) for row in store.audit(tenant)] == [(7, 41), (7, 0)]
    # Neither does a correction, nor the removal of one item.
    store.add(tenant, "ben", [item(77, text=SECRET), item(78, text=SECRET * 3000)])
    store.replace(tenant, "ben", "77", {"text": "harmless"})
    store.remove(tenant, "ben", "78")
    assert SECRET.encode() not in bytes_in(tmp_path)


def test_erasure_waits_for_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pplug_jax.serve.store.PATIENCE", 0.3)
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    tenant = store.tenant("acme")
    store.add(tenant, "ann", [item(0, text=SECRET)])
    with store._reading() as connection:
        connection.exec_driver_sql("SELECT * FROM items").all()
        with pytest.raises(StoreUnavailable, match="erased, but .* keep its log from being cut"):
            store.erase(Caller(tenant), "ann")
    assert store.erase(Caller(tenant), "ann") == 0
    assert SECRET.encode() not in bytes_in(tmp_path)


def test_many_writers_lose_and_double_nothing(store: Store, url: str, tenant: int) -> None:
    stores = [store, Store(url)]  # two servers

    def add(i: int) -> None:
        # Every item is brought twice, by either server.
        stores[i % 2].add(tenant, f"person {i % 3}", [item(i // 2), item(1000 + i // 2)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, itertools.chain(range(60), range(60))))
    for person in range(3):
        pages = store.page(tenant, f"person {person}", limit=1000)
        assert [stored.place for stored in pages] == list(range(1, len(pages) + 1))
        ids = [stored.item["id"] for stored in pages]
        assert len(set(ids)) == len(ids)
        expected = {i // 2 for i in range(60) if i % 3 == person}
        assert set(ids) == {str(k + more) for k in expected for more in (0, 1000)}
    stores[1].close()


WRITER = """
import sys
from pplug_jax.serve.store import Store
store = Store(sys.argv[1])
tenant = store.tenant("acme")
for i in range(10**6):
    call = f"{sys.argv[2]}-{i}"
    items = [{"id": f"{call}-{k}", "text": "t" * 500} for k in range(3)]
    store.add(tenant, f"person {i % 7}", items)
    print(call, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_all_that_it_acknowledged(url: str) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(n)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    told: list[str] = []
    readers = [
        threading.Thread(target=lambda w=writer: told.extend(line.strip() for line in w.stdout))
        for writer in writers
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + 60
    while len(told) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    for writer in writers:
        writer.kill()
        writer.wait()
    for reader in readers:
        reader.join()
    assert len(told) >= 100
    store = Store(url)
    tenant = store.tenant("acme")
    ids = [
        stored.item["id"]
        for name in store.personas(tenant)
        for stored in store.page(tenant, name, limit=10**6)
    ]
    assert len(ids) == len(set(ids))
    by_call: dict[str, int] = {}
    for id in ids:
        by_call[id.rpartition("-")[0]] = by_call.get(id.rpartition("-")[0], 0) + 1
    assert set(by_call.values()) == {3}  # none half
    assert set(told) <= by_call.keys()
    assert len(by_call) <= len(told) + 3  # at most one a writer that it could not tell of
    store.close()


def test_a_store_that_goes_away_and_comes_back(postgres: Postgres) -> None:
    store = Store(postgres.url())
    tenant = store.tenant("acme")
    store.add(tenant, "ann", [item(0)])
    postgres.stop()
    try:
        with pytest.raises(StoreUnavailable, match="is not available: .*; try again") as caught:
            store.newest(tenant, "ann", 9, "e")
        assert "***" not in str(caught.value)  # there was no password to hide
    finally:
        postgres.start()
    assert texts(store.newest(tenant, "ann", 9, "e")) == ["text 0"]
    store.close()


def test_stores_that_cannot_be(tmp_path: Path) -> None:
    for url in ("nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(InputError, match="give sqlite:///FILE or postgresql"):
            Store(url)
    with pytest.raises(StoreUnavailable, match="unable to open database file"):
        Store(f"sqlite:///{tmp_path}/nowhere/store.sqlite")
    with pytest.raises(StoreUnavailable) as caught:
        Store("postgresql+psycopg://me:hidden@127.0.0.1:1/x")
    assert "hidden" not in str(caught.value)


def test_a_full_disk(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    tenant = store.tenant("acme")
    store.add(tenant, "ann", [item(0)])
    with store._writing() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=40")
    with pytest.raises(StoreUnavailable, match="database or disk is full") as caught:
        store.add(tenant, "ann", [item(i, text=SECRET * 9999) for i in range(1, 9)])
    assert SECRET not in str(caught.value)
    assert texts(store.page(tenant, "ann")) == ["text 0"]
    assert store.erase(Caller(tenant), "ann") == 1


def test_lines_that_are_no_items() -> None:
    assert read_lines('{"a": 1}\r\n\n{"b": "\u2028"}') == [{"a": 1}, {"b": "\u2028"}]
    with pytest.raises(InputError, match="line 2: not JSON"):
        read_lines("{}\n{")
    with pytest.raises(InputError, match="line 1: expected an object, found list"):
        read_lines("[]")


def test_the_command_makes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"--store=sqlite:///{tmp_path / 'store.sqlite'}"

    def keys(*arguments: str) -> str:
        main(["keys", *arguments, url])
        return capsys.readouterr().out.strip()

    key = keys("create", "--tenant=acme")
    store = Store(url.partition("=")[2])
    assert store.caller(key) == Caller(store.tenant("acme"), 1)
    assert key.encode() not in bytes_in(tmp_path)
    assert keys("list").startswith("1  acme, made 20")
    assert keys("revoke", "1") == "key 1 is revoked"
    assert "revoked 20" in keys("list")
    assert store.caller(key) is None
    with pytest.raises(SystemExit, match="error: there is no key 1 in use"):
        keys("revoke", "1")


@settings(max_examples=20)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.none()
            | st.booleans()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
        ),
        max_size=5,
    )
)
def test_any_object_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, items: list[dict[str, Any]]
) -> None:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('store') / 'store'}")
    tenant = store.tenant("acme")
    items = [{k: v for k, v in each.items() if k not in ("id", "date")} for each in items]
    items = [each | {"id": str(i)} for i, each in enumerate(items)]
    store.add(tenant, "ann", items)
    assert [stored.item for stored in store.page(tenant, "ann")] == items
