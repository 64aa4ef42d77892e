"""The plug alone, as files that one hands on: weights, what they belong to, and a model card.

    plug.safetensors   the plug's arrays, under the names that checkpoints have
    plug_config.json   method, settings, the prompt's form, scores, and which LLM and encoder it
                       was trained with
    README.md          a model card (`card`)

Nothing in them is code, a path of the machine, or a text or vector of a user.
"""

import dataclasses
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pplug_jax.config import check_config
from pplug_jax.errors import InputError
from pplug_jax.feed.features import compare_with_peers
from pplug_jax.llm import fingerprint
from pplug_jax.methods.shown import layout_of
from pplug_jax.methods.table import METHODS, Method
from pplug_jax.plugs.base import Plug
from pplug_jax.plugs.lora_persona import persona_of
from pplug_jax.plugs.reading import features_of
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.mesh import shardings
from pplug_jax.serve.card import card
from pplug_jax.session.models import Models, model_path
from pplug_jax.session.weights import abstract_weights
from pplug_jax.settings import Settings, upgraded
from pplug_jax.storage.files import is_remote, read_object, write_json, write_text
from pplug_jax.storage.hub import HUB_ID, local_directory
from pplug_jax.storage.workdir import results_path


def _answers_for_a_person(method: Method) -> bool:
    """Whether a plug's method reads the history, or shows items of it to a plug that does not."""
    if not method.trained or not PLUGS[method.kind].reads_input:
        return False
    # A person's store has the newest items alone, and BM25 is of the whole history.
    return method.retrieval == "dense" or (method.history == "own" and not method.retrieval)


# In the order in which people are told of them.
SERVED = {name: method for name, method in METHODS.items() if _answers_for_a_person(method)}
WEIGHTS, PLUG_CONFIG, CARD = "plug.safetensors", "plug_config.json", "README.md"
FORMATS = (1, 2)  # 1 is of `pplug`, and was read without a look at the method
# Settings that say where something lies on a machine, or which machine it is.
OF_THE_MACHINE: dict[str, str | int] = {
    "data.path": "",
    "data.base_url": "",
    "data.history_store": "",
    "llm.converted": "",
    "mesh.slices": 1,
    "mesh.data": -1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}


def shared_name(path: str) -> str:
    """Return a model's or data's name as others know it: of a directory here its last part."""
    here = Path(path).exists() or not (path.startswith("assets/") or HUB_ID.fullmatch(path))
    return Path(path).name if here and not is_remote(path) else path


def served(name: str) -> Method:
    """Return the method of a plug that can be served.

    Raises:
        InputError: there is none of this name.
    """
    if name not in SERVED:
        raise InputError(
            f"the method {name!r} cannot be served; these can: {', '.join(SERVED)} (a variant "
            "can if its settings are those of a run of 'pplug')"
        )
    return SERVED[name]


def write_plug(models: Models, plug: Plug, method: Method, output: Path) -> None:
    """Write the plug's three files to `output`.

    Args:
        models: the run's models; scores are read from results.json in their workdir, if it is
            there. Their config is the method's (`methods.table.configured`).
        plug: the trained plug.
        method: the plug's method.
        output: the directory; files of an earlier export are replaced.

    Raises:
        InputError: the plug cannot be handed on, or `output` not be written.
    """
    config = models.config
    if compare_with_peers(features_of(config.plug)):
        raise InputError(
            "config.plug.features: 'difference' compares with what the training users wrote, so "
            "a plug that reads it cannot be handed on without them; train one without it"
        )
    weights = {name: np.asarray(value) for name, value in _arrays(plug).items()}
    about = describe(models, method, float(persona_of(plug).scale[...]))
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Not `save_file`, whose file nobody else may read.
        (output / WEIGHTS).write_bytes(save(weights, metadata={"format": "np"}))
        write_json(output / PLUG_CONFIG, about)
        write_text(output / CARD, [card(about)])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output} cannot be written: {error}; name another --output") from error


def describe(models: Models, method: Method, scale: float) -> dict[str, Any]:
    """Return the content of plug_config.json.

    Args:
        models: the run's models.
        method: the plug's method.
        scale: the soft tokens' norm at initialisation.
    """
    config, tokenizer = models.config, models.tokenizer
    behind = layout_of(method, config).behind
    count = PLUGS[method.kind].soft_tokens(config, method.reading)
    settings = config.changed(
        OF_THE_MACHINE
        | {
            "methods": (method.name,),
            "variants": "",
            "llm.path": shared_name(config.llm.path),
            "encoder.path": shared_name(config.encoder.path),
            # What an encoder's directory says may be changed there; the plug was trained so.
            "encoder.query_prefix": models.encoder.query_prefix,
            "encoder.item_prefix": models.encoder.item_prefix,
        }
    )
    results = _read_results(models.workdir)
    own = results["methods"].get(method.name) if results else None
    if own is None:
        results = None  # of other methods
    elif rate := own.get("learning_rate"):  # which may be tuned
        settings = settings.changed({"train.learning_rate": rate})
    return {
        "format": FORMATS[method.name != "pplug"],
        "method": method.name,
        "llm": {
            "name": settings.llm.path,
            "fingerprint": fingerprint(model_path(config.llm.path, "llm")),
            "width": models.abstract_llm.config.hidden_size,
        },
        "encoder": {
            "name": settings.encoder.path,
            "fingerprint": models.encoder.fingerprint,
            "width": models.encoder.size,
        },
        "prompt": _prompt_form(models, behind),
        "soft_tokens": count,
        "layout": tokenizer.layout(count, behind),
        "scale": scale,
        "config": dataclasses.asdict(settings),
        "results": results and results | {"llm": settings.llm.path},
    }


def _read_results(workdir: Path) -> dict[str, Any] | None:
    """Return the scores of the run, or those that its plug was handed on with."""
    if (workdir / PLUG_CONFIG).is_file():
        return read_object(workdir / PLUG_CONFIG)["results"]
    path = results_path(workdir)
    if not path.is_file():
        return None
    results = read_object(path)
    data = str(results["data"])
    return results | {"data": shared_name(data) if Path(data).exists() else data}


def _prompt_form(models: Models, behind: bool) -> dict[str, Any]:
    """Return where the soft tokens stand and the fixed tokens around the input."""
    tokenizer = models.tokenizer
    return {
        "place": "behind" if behind else "front",
        "prefix": tokenizer.prefix,
        "suffix": tokenizer.suffix,
        "joint": tokenizer.joint,
    }


def read_plug(
    path: str | Path, llm: str | Path | None, encoder: str | Path | None
) -> tuple[Models, Plug, Method]:
    """Load what `write_plug` wrote, with the models that it was trained with.

    Args:
        path: the directory, or a hub id or URL.
        llm: the LLM; None is the name that the plug knows it by.
        encoder: the encoder; None likewise.

    Raises:
        InputError: a file is missing or bad, or a model is not the one that the plug was trained
            with; the message names both.
    """
    try:
        directory = local_directory(path)
    except InputError as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise InputError(
            f"there is no plug {str(path)!r}; give a run's workdir, or a plug that was handed on "
            f"(--mode=export) as a directory, URL or hub id{reason}"
        ) from error
    about = _read_about(directory / PLUG_CONFIG)
    method = served(about["method"])
    config = Settings.of(upgraded(about["config"]))
    for role, given in (("llm", llm), ("encoder", encoder)):
        name = about[role]["name"] if given is None else str(given)
        try:
            model_path(name, role)
        except InputError as error:
            raise InputError(
                f"{path}: the plug was trained with the {role} {about[role]['name']!r}, and "
                f"{name!r} cannot be had; give its directory, {role}=DIR ({error})"
            ) from error
        config = config.changed({f"{role}.path": name})
    check_config(config)
    path_of_llm = model_path(config.llm.path, "llm")
    _check_same(path, "llm", about, config.llm.path, fingerprint(path_of_llm))
    models = Models(config, directory)
    _check_same(path, "encoder", about, config.encoder.path, models.encoder.fingerprint)
    form = _prompt_form(models, layout_of(method, config).behind)
    if form != about["prompt"]:
        raise InputError(
            f"{path}: the plug was trained with prompts of the form {about['layout']!r}, but the "
            f"tokenizer of {config.llm.path} makes others ({form}, not {about['prompt']}); give "
            "the LLM with the tokenizer and chat template of then"
        )
    return models, _read_weights(models, method, directory / WEIGHTS), method


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a plug to load is a directory, hub id or URL that "
            "--mode=export wrote (a run's workdir is loaded by Personalizer.from_checkpoint)"
        )
    about = read_object(path)
    if about.get("format") not in FORMATS:
        raise InputError(
            f"{path}: the format is {about.get('format')!r}, and this version reads "
            f"{' and '.join(map(str, FORMATS))}: install the version of pplug_jax that wrote it"
        )
    kinds = {"method": str, "llm": dict, "encoder": dict, "prompt": dict, "config": dict}
    for field, kind in kinds.items():
        if not isinstance(about.get(field), kind):
            raise InputError(f"{path}: the field {field!r} is missing; export the plug again")
    return about


def _check_same(
    path: str | Path,
    role: str,
    about: dict[str, Any],
    given: str,
    actual: str,
) -> None:
    trained = about[role]
    if actual != trained["fingerprint"]:
        raise InputError(
            f"{path}: the plug was trained with the {role} {trained['name']!r} (fingerprint "
            f"{trained['fingerprint']}), and {given!r} is another ({actual}): what it "
            f"says to one means nothing to another; give the former, {role}=DIR"
        )


def _arrays(plug: nnx.Module) -> dict[str, Any]:
    """Return the plug's arrays by the names that the file has."""
    flat = nnx.to_flat_state(nnx.state(plug))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def _read_weights(models: Models, method: Method, path: Path) -> Plug:
    """Return the plug with the file's arrays, laid out on the models' mesh."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); fetch or export the plug again"
        ) from error
    abstract = abstract_weights(models, method, models.config)
    wanted = {name: (x.shape, x.dtype) for name, x in _arrays(abstract).items()}
    present = {name: (x.shape, x.dtype) for name, x in stored.items()}
    if wrong := sorted(
        name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name)
    ):
        raise InputError(
            f"{path}: {wrong[0]} is {present.get(wrong[0], 'missing')}, and {PLUG_CONFIG} asks for "
            f"{wanted.get(wrong[0], 'none')}; export the plug again"
        )
    graph, state = nnx.split(abstract)
    places = nnx.to_flat_state(shardings(abstract, models.mesh))
    flat = [
        (
            name,
            variable.replace(jax.device_put(stored[".".join(map(str, name))], place.get_value())),
        )
        for (name, variable), (_, place) in zip(nnx.to_flat_state(state), places, strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def upload(directory: Path, repository: str) -> str:
    """Put an exported plug into a repository of the hub, and return its address there.

    Raises:
        InputError: the hub refuses it.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=[WEIGHTS, PLUG_CONFIG, CARD],
            commit_message="Add a plug",
        )
    except (OSError, ValueError) as error:  # the hub's errors are both kinds
        raise InputError(
            f"{repository}: the hub did not take the plug: {error} (log in with `hf auth login` "
            "as one who may write there)"
        ) from error
    return str(commit.repo_url)
