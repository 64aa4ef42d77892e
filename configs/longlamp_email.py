"""LongLaMP, e-mails (needs the Avocado e-mails); `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common, llms


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.base_config()
    c.task = "email_generation"
    llms.use(c, arg)
    common.long_outputs(c)
    return c
