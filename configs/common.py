"""What the configs of all tasks share; the defaults are those of `pplug_jax.settings`."""

import ml_collections

from configs import llms
from pplug_jax.settings import Settings


def base_config() -> ml_collections.ConfigDict:
    return Settings().config()


def task_config(task: str, argument: str) -> ml_collections.ConfigDict:
    """The defaults for a task with the LLM that `configs/TASK.py:ARGUMENT` names."""
    c = base_config()
    c.task = task
    llms.use(c, argument)
    return c


def long_outputs(c: ml_collections.ConfigDict) -> None:
    """Lengths for outputs of several hundred words, as LongLaMP's; the paper has none."""
    c.data.time_based = False  # its two settings are data sets of their own
    c.data.max_input_length = 512
    c.data.max_target_length = 512
    c.eval.max_new_tokens = 512
    c.eval.batch_size = 16
