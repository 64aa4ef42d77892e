"""What did best on real texts with a frozen LLM (docs/results.md), for any task.

`--config=configs/best.py:lamp4` or `--config=configs/best.py:lamp4:llama3_8b@v5e-8`: the task's
config and the LLM's name. The prompt shows what the person wrote on the four nearest inputs, where
the task's items say that. Behind it stand four soft tokens of the persona and four of the form of
their texts. Controls without one or the other are run too. For `custom`, whose data say what people
wrote or do not, name these methods. The method `pplug_paper` is the paper's plug beside it.
"""

import importlib
from pathlib import Path

import ml_collections

from pplug_jax.data.tasks import TASKS
from pplug_jax.runtime.slips import near

NO_TASKS = ("best", "common", "llms")


def get_config(arg: str = "lamp5") -> ml_collections.ConfigDict:
    task, *llm = arg.split(":", 1)
    tasks = {path.stem for path in Path(__file__).parent.glob("*.py")}.difference(NO_TASKS)
    if task not in tasks:
        known = ", ".join(sorted(tasks))
        raise ValueError(f"{task!r} is unknown{near(task, tasks)}; known: {known}")
    c = importlib.import_module(f"configs.{task}").get_config(*llm)
    c.plug.num_persona_tokens = 4
    c.plug.projector_size = 1024
    c.plug.temperature = 0.3
    c.plug.learned_temperature = False
    c.plug.features = ("form",)
    c.plug.encoder_rate = 0.0
    c.plug.history_dropout = 0.2
    c.plug.persona_dropout = 0.1  # or new users would get soft tokens that nothing trained
    # An LLM with an encoder reads the whole prompt at once: behind it nothing is gained.
    c.plug.place = "front" if any("t5" in name for name in llm) else "behind"
    if TASKS[c.task].answer and "pplug" in c.methods:
        controls = "instruction_only+answers", "shuffled_user+answers"
        c.methods = ("none", "bm25", "answers", "pplug+answers", *controls)
        c.eval.top_k = 4
    return c
