"""LaMP-5, scholarly title generation.

`--config=configs/lamp5.py` runs on the embedded sample with the bundled tiny models.
`--config=configs/lamp5.py:llama3_1b` is for real data, `:llama3_1b@v5e-8` also for that slice;
`configs/llms.py` lists the LLMs.
"""

import ml_collections

from configs import common


def get_config(arg: str = "embedded") -> ml_collections.ConfigDict:
    c = common.task_config("LaMP_5", arg)
    if arg == "embedded":
        c.data.sample_train_users = 2000
        c.data.sample_eval_users = 400
        c.data.max_input_length = 160
        c.data.max_target_length = 48
        c.data.buckets = 1  # the sample's inputs are all about as long
        c.plug.num_persona_tokens = 16
        c.plug.projector_size = 2048
        c.plug.temperature = 0.3
        c.plug.learned_temperature = True
        # The encoder is pretrained and the projectors are new, so it wants smaller steps.
        c.plug.encoder_rate = 0.1
        c.plug.history_dropout = 0.2
        c.train.batch_size = 16
        c.train.epochs = 4.0
        c.train.learning_rate = 1e-2
        c.eval.num_beams = 1
        c.eval.max_new_tokens = 40
        c.eval.top_k = 1  # of 8 to 16 items; 4 would be a third of a history
    return c
