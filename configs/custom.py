"""Your own users, from DIR/train.jsonl and DIR/dev.jsonl in the format of docs/data.md.

`--config=configs/custom.py:gemma3_1b --config.data.path=DIR`; `configs/llms.py` lists the LLMs.
"""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.task_config("custom", arg)
    c.data.time_based = False
    return c
