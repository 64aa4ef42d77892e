"""LaMP-3, product rating; `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common, llms


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.base_config()
    c.task = "LaMP_3"
    llms.use(c, arg)
    c.train.epochs = 11.0  # the paper's 1, over 11 copies
    c.data.max_target_length = 10
    c.eval.max_new_tokens = 10
    return c
