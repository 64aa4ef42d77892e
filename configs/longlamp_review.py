"""LongLaMP, product reviews; `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common, llms


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.base_config()
    c.task = "product_review_writing"
    llms.use(c, arg)
    common.long_outputs(c)
    c.data.eval_split = "val"
    return c
