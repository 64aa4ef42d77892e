"""LaMP-1, citation identification; `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common, llms


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.base_config()
    c.task = "LaMP_1"
    llms.use(c, arg)
    return c
