"""LaMP-3, product rating; `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.task_config("LaMP_3", arg)
    c.train.epochs = 11.0  # the paper's 1, over 11 copies
    c.data.max_target_length = 10
    c.eval.max_new_tokens = 10
    return c
