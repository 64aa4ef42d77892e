"""LongLaMP, paper abstracts; `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.task_config("generation_abstract", arg)
    common.long_outputs(c)
    c.data.eval_split = "val"
    return c
