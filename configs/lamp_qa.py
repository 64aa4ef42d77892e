"""LaMP-QA, answers to questions; `configs/llms.py` lists the arguments.

Its records have no answers to train on, so that only the untrained methods are asked for; with
answers of your own under `output`, add pplug and instruction_only to the methods.
"""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.task_config("LaMP_QA", arg)
    c.methods = ("none", "bm25", "recency")
    common.long_outputs(c)
    # Its three categories are files of their own; the others are Lifestyle_and_Personal_Development
    # and Society_and_Culture.
    c.data.train_split = "Art_and_Entertainment_train"
    c.data.eval_split = "Art_and_Entertainment_validation"
    c.data.max_input_length = 1024
    c.eval.top_k = 10  # as its own baseline
    return c
