"""The plug that did best on real texts (docs/results.md), for any task.

`--config=configs/best.py:lamp4` or `--config=configs/best.py:lamp4:llama3_8b@v5e-8`: the task's
config and the LLM's name. The method `pplug_paper` is the paper's plug beside it.
"""

import importlib

import ml_collections


def get_config(arg: str = "lamp5") -> ml_collections.ConfigDict:
    task, *llm = arg.split(":", 1)
    c = importlib.import_module(f"configs.{task}").get_config(*llm)
    c.plug.num_persona_tokens = 4
    c.plug.projector_size = 1024
    c.plug.temperature = 0.3
    c.plug.learned_temperature = False
    c.plug.form = True
    c.plug.encoder_rate = 0.0
    c.plug.history_dropout = 0.2
    return c
