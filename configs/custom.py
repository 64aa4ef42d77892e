"""Your own users, from DIR/train.jsonl and DIR/dev.jsonl in the format of docs/data.md.

`--config=configs/custom.py:gemma3_1b --config.data.path=DIR`; `configs/llms.py` lists the LLMs.
"""

import ml_collections

from configs import common, llms


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.base_config()
    c.task = "custom"
    c.data.time_based = False
    llms.use(c, arg)
    return c
