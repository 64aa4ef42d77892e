"""LaMP-6, e-mail subjects (needs the Avocado e-mails); `configs/llms.py` lists the arguments."""

import ml_collections

from configs import common, llms


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.base_config()
    c.task = "LaMP_6"
    llms.use(c, arg)
    return c
