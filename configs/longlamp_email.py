"""LongLaMP, e-mails (needs the Avocado e-mails); `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.task_config("email_generation", arg)
    common.long_outputs(c)
    return c
