"""Put a server together."""

from pathlib import Path

from pplug_jax.errors import InputError
from pplug_jax.serve.app import Service
from pplug_jax.serve.engine.jax_engine import JaxEngine
from pplug_jax.serve.engine.vllm_engine import VllmEngine
from pplug_jax.serve.handover import PLUG_CONFIG
from pplug_jax.serve.metrics import Metrics
from pplug_jax.serve.people import People
from pplug_jax.serve.personalizer import Personalizer
from pplug_jax.serve.store import Store
from pplug_jax.storage.workdir import CONFIG, run_path


def load_plug(
    plug: str,
    llm: str | None = None,
    encoder: str | None = None,
    method: str | None = None,
) -> Personalizer:
    """Load a run's workdir, or a plug that was handed on.

    Args:
        plug: the workdir, or the plug's directory, URL or hub id.
        llm: the LLM of a plug that was handed on; None is the name that the plug knows.
        encoder: its encoder; None likewise.
        method: of a run: which of its methods answers; None is the first that has such a plug.
            What was handed on has its own.

    Raises:
        InputError: it is neither, of another method, or its models are not there.
    """
    directory = Path(plug)
    if (run_path(directory) / CONFIG).is_file() and not (directory / PLUG_CONFIG).is_file():
        return Personalizer.from_checkpoint(directory, method=method)
    personalizer = Personalizer.from_pretrained(plug, llm=llm, encoder=encoder)
    if method not in (None, personalizer.method.name):
        raise InputError(f"--method={method}: {plug} is a plug of {personalizer.method.name!r}")
    return personalizer


def make_service(
    name: str,
    personalizer: Personalizer,
    store: Store,
    *,
    slots: int = 32,
    engine_url: str | None = None,
) -> Service:
    """Load the LLM of a plug, and compile what answers.

    Args:
        name: the model's name for clients.
        personalizer: the plug.
        store: the histories.
        slots: how many are answered at a time.
        engine_url: of a vLLM server that has the LLM and answers; None is to answer here.

    Raises:
        InputError: the LLM cannot be loaded, or the server does not do.
    """
    models = personalizer.models
    metrics = Metrics()
    limits = {
        "longest_prompt": personalizer.longest_prompt,
        "max_new_tokens": models.config.eval.max_new_tokens,
        "slots": slots,
    }
    engine: JaxEngine | VllmEngine
    if engine_url is None:
        engine = JaxEngine(
            personalizer.llm,
            models.mesh,
            reader=models.llm,
            own_rows=personalizer.own_rows,
            **limits,
        )
    elif personalizer.changes_llm:
        raise InputError(
            f"--engine_url={engine_url}: the plug changes its LLM by a LoRA, which a server does "
            "not have; answer here (--engine=jax), or serve a method without one"
        )
    else:
        engine = VllmEngine(engine_url, models.abstract_llm, **limits)
    metrics.watch("num_requests_running", "Answers under way.", lambda: engine.running)
    metrics.watch("num_requests_waiting", "Answers that wait.", lambda: engine.waiting)
    people = People(personalizer, store, metrics)
    return Service(name, people, engine, metrics)
