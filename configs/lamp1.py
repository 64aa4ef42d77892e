"""LaMP-1, citation identification; `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    return common.task_config("LaMP_1", arg)
