"""Models named by directory, URL or hub id."""

from pathlib import Path

import fsspec
import huggingface_hub
import pytest

from pplug_jax.errors import InputError
from pplug_jax.hub import local_directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert local_directory(tmp_path) == local_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "/nowhere", "nowhere", "a/b/c", "../nowhere/else"])
def test_no_directory(name: str) -> None:
    with pytest.raises(InputError, match=f"there is no directory '{name}'; give a model"):
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
