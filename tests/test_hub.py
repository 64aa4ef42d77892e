"""Models named by directory, URL or hub id."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import fsspec
import huggingface_hub
import pytest

from pplug_jax.errors import InputError
from pplug_jax.runtime import retry
from pplug_jax.storage import gguf
from pplug_jax.storage.hub import chosen, local_directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert local_directory(tmp_path) == local_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "/nowhere", "nowhere", "a/b/c", "../nowhere/else", "a.gguf"])
def test_no_directory(name: str) -> None:
    with pytest.raises(InputError, match=f"there is no (directory|file) '{name}'; give a model"):
        local_directory(name)


def test_a_hub_id_comes_from_the_hubs_cache(home: Path) -> None:
    repository = home / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    (snapshot / "config.json").write_text("{}")
    assert local_directory("org/name") == snapshot


def test_a_hub_id_that_cannot_be_had(home: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)no directory 'org/name', and the hub .*--local-dir"):
        local_directory("org/name")


def test_a_url_is_fetched_once_and_again_when_it_changes(
    home: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.put(str(tiny_llama), "/bucket/model", recursive=True)
    remote.pipe("/bucket/model/1_Pooling/config.json", b"{}")
    remote.pipe("/bucket/model/pytorch_model.bin", b"the same again")
    first = local_directory("memory://bucket/model")
    assert first.is_relative_to(home)
    assert (first / "1_Pooling" / "config.json").is_file()
    found = {file.name for file in first.iterdir() if file.is_file()}
    assert found == {file.name for file in tiny_llama.iterdir()}
    for name in found:
        assert (first / name).read_bytes() == (tiny_llama / name).read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "get_file", None)
        assert local_directory("memory://bucket/model") == first
    remote.pipe("/bucket/model/config.json", b'{"changed": 1}')
    second = local_directory("memory://bucket/model")
    assert (second / "config.json").read_bytes() == b'{"changed": 1}'
    assert (first / "config.json").read_bytes() != b'{"changed": 1}'


def test_what_was_half_fetched_is_fetched_again(
    home: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.put(str(tiny_llama), "/bucket/other", recursive=True)
    whole = type(remote).get_file

    def broken(self: object, source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        whole(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "get_file", broken)
        with pytest.raises(KeyboardInterrupt):
            local_directory("memory://bucket/other")
    path = local_directory("memory://bucket/other")
    name = "model.safetensors"
    assert (path / name).read_bytes() == (tiny_llama / name).read_bytes()
    assert {file.name for file in path.iterdir()} == {file.name for file in tiny_llama.iterdir()}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/nothing", "there are no model files"),
        ("nosuch://bucket/model", "cannot be read: Protocol not known: nosuch"),
    ],
)
def test_a_url_that_holds_no_model(home: Path, url: str, message: str) -> None:
    with pytest.raises(InputError, match=f"{url}.*{message}"):
        local_directory(url)


def test_weights_are_fetched_once_in_the_best_format() -> None:
    about = ["config.json", "tokenizer.json", "1_Pooling/config.json", "spiece.model"]
    safe = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    old = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    others = ["original/consolidated.safetensors", "onnx/model.onnx", "tf_model.h5", "2/model.bin"]
    assert chosen([*about, *safe, *old, *others]) == [*about, *safe]
    assert chosen([*about, *old, *others]) == [*about, *old]
    assert chosen([*about, *others]) == about


class Hub:
    """Stands for the hub's repository org/name; errors are raised by the next calls."""

    def __init__(self, directory: Path, sizes: dict[str, int]):
        self.directory, self.sizes = directory, sizes
        self.errors: list[Exception] = []
        self.fetched: list[str] = []

    def __call__(
        self, name: str, *, dry_run: bool = False, allow_patterns: Sequence[str] = ()
    ) -> Any:
        assert name == "org/name"
        if self.errors:
            raise self.errors.pop()
        if dry_run:
            return [
                SimpleNamespace(filename=n, file_size=s, will_download=n not in self.fetched)
                for n, s in self.sizes.items()
            ]
        self.fetched += allow_patterns
        return str(self.directory)


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(retry, "WAIT", 0.0)
    made = Hub(home, {"config.json": 10, "pytorch_model.bin": 4 * 10**8, "flax.msgpack": 10**15})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    return made


def test_a_hub_repository_of_pytorch_files_alone(hub: Hub) -> None:
    assert local_directory("org/name") == hub.directory
    assert hub.fetched == ["config.json", "pytorch_model.bin"]


def test_what_fails_for_a_moment_is_asked_again(hub: Hub) -> None:
    hub.errors = [OSError("503 Service Unavailable"), OSError("429 Too Many Requests")]
    assert local_directory("org/name") == hub.directory
    hub.errors = [OSError("401 Unauthorized"), OSError("never reached")]
    with pytest.raises(InputError, match="never reached"):
        local_directory("org/name")
    assert len(hub.errors) == 1


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**8))
    with pytest.raises(InputError, match=r"org/name needs 0\.4 GB, but .* has 0\.3 GB left: .*HF_"):
        local_directory("org/name")
    assert hub.fetched == []
    hub.fetched = ["pytorch_model.bin"]  # what is there already takes no room
    assert local_directory("org/name") == hub.directory


def test_a_url_that_does_not_fit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/bucket/large/model.safetensors", b"weights")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(InputError, match="memory://bucket/large needs 0.0 GB"):
        local_directory("memory://bucket/large")


def test_a_url_is_read_again_where_it_fails_for_a_moment(
    home: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fsspec.filesystem("memory")
    remote.put(str(tiny_llama), "/bucket/flaky", recursive=True)
    monkeypatch.setattr(retry, "WAIT", 0.0)
    whole, errors = type(remote).get_file, [OSError("503 Service Unavailable")] * 3

    def flaky(self: object, source: str, target: str) -> None:
        if errors:
            Path(target).write_bytes(b"half")
            raise errors.pop()
        whole(self, source, target)

    monkeypatch.setattr(type(remote), "get_file", flaky)
    path = local_directory("memory://bucket/flaky")
    assert not errors
    for file in tiny_llama.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setattr(type(remote), "get_file", Mock(side_effect=PermissionError("403")))
    remote.pipe("/bucket/flaky/config.json", b"{}")
    with pytest.raises(InputError, match=r"memory://bucket/flaky cannot be read: .*403"):
        local_directory("memory://bucket/flaky")


@pytest.mark.parametrize("place", ["memory://bucket/llms/any.gguf", "org/name/sub/any.gguf"])
def test_a_gguf_file_elsewhere(hub: Hub, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/bucket/llms/any.gguf", b"GGUF")
    fsspec.filesystem("memory").pipe("/bucket/llms/other.gguf", b"GGUF")
    hub.sizes = {"sub/any.gguf": 4, "sub/other.gguf": 10**15}
    found: list[Path] = []
    monkeypatch.setattr(gguf, "directory_of", found.append)
    local_directory(place)
    assert [path.name for path in found] == ["any.gguf"]
    assert hub.fetched == (["sub/any.gguf"] if place.startswith("org") else [])
    with pytest.raises(InputError, match=r"no sub/no\.gguf|there are no model files"):
        local_directory(place.replace("any", "no"))
