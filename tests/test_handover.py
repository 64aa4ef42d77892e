"""A plug that is handed on is the one that was trained, and belongs to its LLM and encoder."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pplug_jax import Personalizer
from pplug_jax.errors import InputError
from pplug_jax.llm import fingerprint
from pplug_jax.serve.handover import shared_name, write_plug
from pplug_jax.serve.personalizer import export
from pplug_jax.session.models import ASSETS
from pplug_jax.settings import flatten
from tests.support.environment import ROOT
from tests.support.forks import Fork

INPUT = "Generate a title for the following abstract of a paper: Rivers are measured."
HISTORY = [{"title": f"On rivers {i}", "abstract": f"River {i}."} for i in range(5)]
FILES = ["README.md", "plug.safetensors", "plug_config.json"]


@pytest.fixture(scope="module")
def trained(finished: Path) -> Personalizer:
    return Personalizer.from_checkpoint(finished)


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--mode=export` writes; don't write to it."""
    output = tmp_path_factory.mktemp("export") / "plug"
    export(finished, output)
    return output


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "plug"))


def edit(directory: Path, **fields: Any) -> Path:
    path = directory / "plug_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


@pytest.mark.slow
def test_the_round_trip_is_bit_equal(trained: Personalizer, copy: Path) -> None:
    before = sorted(path.name for path in copy.iterdir())
    loaded = Personalizer.from_pretrained(copy)
    for history in (HISTORY, []):
        soft = trained.soft_prompt(INPUT, history)
        np.testing.assert_array_equal(loaded.soft_prompt(INPUT, history), soft)
        assert loaded.generate(INPUT, history) == trained.generate(INPUT, history)
    assert sorted(path.name for path in copy.iterdir()) == before == FILES  # nothing is left there
    assert len({path.stat().st_mode for path in copy.iterdir()}) == 1  # whoever reads one reads all
    write_plug(loaded.models, loaded.plug, loaded.method, copy.parent / "again")
    for name in FILES:
        assert (copy.parent / "again" / name).read_bytes() == (copy / name).read_bytes(), name


@pytest.mark.slow
def test_no_path_of_the_machine(exported: Path, finished: Path) -> None:
    text = b"".join((exported / name).read_bytes() for name in FILES).decode(errors="replace")
    for part in (str(ROOT), str(finished), str(Path.home()), str(exported)):
        assert part not in text
    config = json.loads((exported / "plug_config.json").read_text())
    settings = flatten(config["config"])
    assert not [value for value in settings.values() if str(value).startswith("/")]
    assert config["llm"] == {
        "name": "assets/tiny_llama",
        "fingerprint": fingerprint(ASSETS / "tiny_llama"),
        "width": 128,
    }
    assert config["scale"] == load_file(exported / "plug.safetensors")["scale"]


@pytest.mark.slow
def test_the_card_has_the_scores(exported: Path, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    card = (exported / "README.md").read_text()
    for method in results["methods"]:
        assert re.search(rf"^\| {method} \| ", card, re.MULTILINE)
    score = results["methods"]["pplug"]["rouge1"]
    assert "{value:.3f} [{low:.3f}, {high:.3f}]".format(**score) in card
    assert "Not run here" not in card
    assert "base_model" not in card  # the bundled LLM is on no hub


@pytest.mark.slow
def test_a_card_says_what_was_not_run(
    trained: Personalizer, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained.models, "workdir", tmp_path)
    write_plug(trained.models, trained.plug, trained.method, tmp_path / "plug")
    assert "was not evaluated before" in (tmp_path / "plug/README.md").read_text()
    results = json.loads((finished / "results.json").read_text())
    del results["methods"]["shuffled_user"]
    (tmp_path / "results.json").write_text(json.dumps(results | {"data": str(tmp_path)}))
    write_plug(trained.models, trained.plug, trained.method, tmp_path / "plug")
    card = (tmp_path / "plug/README.md").read_text()
    assert "**Not run here: shuffled_user.**" in card
    assert tmp_path.name in card
    assert str(tmp_path) not in card
    del results["methods"]["pplug"]  # only others were
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_plug(trained.models, trained.plug, trained.method, tmp_path / "plug")
    assert "was not evaluated before" in (tmp_path / "plug/README.md").read_text()


@pytest.mark.slow
def test_another_model_is_refused_by_both_names(
    exported: Path, tiny_llama: Path, tiny_bert: Path
) -> None:
    for role, other, ours in (
        ("llm", tiny_llama, "assets/tiny_llama"),
        ("encoder", tiny_bert, "assets/tiny_bert"),
    ):
        with pytest.raises(InputError, match=f"with the {role} '{ours}' .*, and '{other}' is anot"):
            Personalizer.from_pretrained(exported, **{role: other})
        with pytest.raises(
            InputError, match=rf"{role} '{ours}', and 'nowhere' cannot .*{role}=DIR"
        ):
            Personalizer.from_pretrained(exported, **{role: "nowhere"})


@pytest.mark.slow
def test_the_same_model_elsewhere_is_taken(exported: Path, tmp_path: Path) -> None:
    llm = shutil.copytree(ASSETS / "tiny_llama", tmp_path / "llm")
    encoder = shutil.copytree(ASSETS / "tiny_bert", tmp_path / "encoder")
    loaded = Personalizer.from_pretrained(str(exported), llm=str(llm), encoder=encoder)
    assert loaded.soft_prompt(INPUT).shape == (5, 128)


@pytest.mark.slow
def test_files_that_are_not_whole(copy: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            Personalizer.from_pretrained(copy)

    about = json.loads((copy / "plug_config.json").read_text())
    edit(copy, prompt=about["prompt"] | {"suffix": [7]})
    refused("with prompts of the form .*tokenizer of assets/tiny_llama makes others")
    edit(copy, **about)
    weights = load_file(copy / "plug.safetensors")
    save_file({**weights, "scale": np.zeros(2, np.float32)}, copy / "plug.safetensors")
    refused(r"plug\.safetensors: scale is \(\(2,\), .* asks for \(\(\), ")
    del weights["projector.up"]
    save_file(weights, copy / "plug.safetensors")
    refused("projector.up is missing")
    (copy / "plug.safetensors").write_bytes(b"PK")
    refused("not a whole safetensors file")
    edit(copy, format=99)
    refused("the format is 99, and this version reads 1 and 2: install")
    edit(copy, format=1, llm=None)
    refused("the field 'llm' is missing; export the plug again")
    (copy / "plug_config.json").unlink()
    refused(r"plug_config\.json: no such file; a plug to load is")


@pytest.mark.slow
def test_a_plug_that_compares_users_is_not_handed_on(
    trained: Personalizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained.models.config.changed({"plug.features": ("difference",)})
    monkeypatch.setattr(trained.models, "config", config)
    with pytest.raises(InputError, match="'difference' compares with what the training users"):
        write_plug(trained.models, trained.plug, trained.method, tmp_path / "plug")
    assert not (tmp_path / "plug").exists()


@pytest.mark.slow
def test_push_to_hub(
    trained: Personalizer, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: dict[str, bytes] = {}

    def upload_folder(*, repo_id: str, folder_path: Path, **settings: Any) -> SimpleNamespace:
        assert settings["allow_patterns"] == ["plug.safetensors", "plug_config.json", "README.md"]
        there.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    made: list[str] = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, exist_ok: made.append(name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert trained.push_to_hub("org/plug") == "https://hub/org/plug"
    assert made == ["org/plug"]
    assert there == {name: (exported / name).read_bytes() for name in FILES}

    def refuse(name: str, exist_ok: bool) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(InputError, match="org/plug: the hub did not take the plug: no token"):
        trained.push_to_hub("org/plug")


@pytest.mark.slow
def test_the_command(finished: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> tuple[int | None, str]:
        environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
        process = Fork("pplug_jax.main", *arguments, env=environment)
        said = "".join(process.communicate(timeout=300))
        return process.returncode, said

    output = tmp_path / "plug"
    code, said = command("--mode=export", f"--workdir={finished}", f"--output={output}")
    assert code == 0, said
    assert f"{output}: the plug (plug.safetensors, " in said
    assert sorted(path.name for path in output.iterdir()) == FILES
    code, said = command("--mode=export", f"--workdir={tmp_path}", f"--output={output}")
    assert code == 1
    assert f"error: {tmp_path}/config.json: no such file" in said


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("assets/tiny_llama", "assets/tiny_llama"),
        ("org/name", "org/name"),
        ("org/name/file.gguf", "org/name/file.gguf"),
        ("gs://bucket/dir", "gs://bucket/dir"),
        ("/somewhere/models/llama", "llama"),
        ("../models/llama", "llama"),
        ("a/b/c/llama", "llama"),
    ],
)
def test_the_name_of_a_model(path: str, name: str) -> None:
    assert shared_name(path) == name


def test_a_fingerprint_is_of_the_weights(
    make_llama: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert fingerprint(copied) == fingerprint(tiny_llama)
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.01}, copied / "model.safetensors")
    assert fingerprint(copied) != fingerprint(tiny_llama)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | extra, copied / "model.safetensors")
    assert fingerprint(copied) == fingerprint(tiny_llama)
