"""What the configs of all tasks share; the defaults are the paper's where it states them."""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import llms
from pplug_jax.data.download import BASE_URL


def base_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0, 1, 2)  # of --mode=compare; `seed` is that of the data then
    # Plugs with other settings, by the names that `methods` may have besides, such as
    # "{'k16': {'plug.num_persona_tokens': 16}}".
    c.variants = ""
    c.task = ""
    c.parity = False  # the official code's choices where ours differ: config.PARITY
    c.methods = (
        "none",
        "bm25",
        "recency",
        "pplug",
        "instruction_only",
        "shuffled_user",
        "mean_persona",
    )

    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # the task's files; empty: the embedded sample, or data/[time/]TASK
    c.data.time_based = True  # LaMP's split by time, the paper's; otherwise by user
    c.data.base_url = BASE_URL  # of --mode=download
    c.data.on_error = "stop"  # at a bad record, or skip: list it in WORKDIR/bad_records.jsonl
    c.data.train_split = "train"
    c.data.eval_split = "dev"
    c.data.sample_train_users = 0
    c.data.sample_eval_users = 0
    c.data.max_input_length = 256  # the LLM's tokens of the input, demonstrations included
    c.data.max_target_length = 128
    c.data.max_history = 512  # newest items of a profile
    c.data.sort_by_date = True  # profiles whose items all have dates
    c.data.history_labels = True  # read a history item with its tag or score, where it has one
    c.data.buckets = 6  # padded text lengths, and so compiled shapes
    # A directory on a disk; empty: WORKDIR/history, or history/ where the workdir is gs://...
    c.data.history_store = ""

    c.llm = ml_collections.ConfigDict()
    c.llm.path = ""  # Hugging Face directory, URL (gs://...) or hub id; assets/NAME is bundled
    c.llm.dtype = "bfloat16"
    c.llm.quantize = ""  # int8 or int4: how the frozen kernels are stored
    c.llm.converted = ""  # where --mode=convert writes it, also gs://; empty: WORKDIR/llm
    c.llm.chat = False  # use the tokenizer's chat template
    c.llm.separator = "\n"  # between input and answer, without a chat template

    c.encoder = ml_collections.ConfigDict()
    c.encoder.path = ""
    c.encoder.pooling = ""  # cls or mean; empty: as the directory says
    # In front of every input and of every history text, as "query: " and "passage: " for E5; None:
    # as the directory says.
    c.encoder.query_prefix = placeholder(str)
    c.encoder.item_prefix = placeholder(str)
    c.encoder.max_length = 512
    c.encoder.dtype = "float32"
    c.encoder.batch_size = 64

    c.plug = ml_collections.ConfigDict()
    # Where the soft tokens stand: in front of the input, as in the paper, or behind it, which a
    # decoder-only LLM can do with less work: what it makes of the input then depends on no user.
    c.plug.place = "front"
    c.plug.num_persona_tokens = 1
    c.plug.projector_size = 0  # the persona projector's hidden units; 0: the LLM's width
    c.plug.temperature = 1.0
    c.plug.learned_temperature = False
    c.plug.recency = False  # learn to weigh older items less, in profiles with dates
    # Tokens more, of what else is told of the items: "form", how the user writes (capitals,
    # punctuation, length), and "difference", how the items differ from other users' similar ones.
    c.plug.features = ()
    # The input encoder's learning rate over the others'; 1 is the paper, 0 leaves it as it was.
    c.plug.encoder_rate = 1.0
    c.plug.history_dropout = 0.5  # largest share of a history that training leaves out
    c.plug.persona_dropout = 0.0  # share of the training examples that get the null persona
    c.plug.dtype = "float32"  # of the computation; parameters are always float32

    c.train = ml_collections.ConfigDict()
    c.train.batch_size = 64
    c.train.accumulation = 1  # parts that a batch is worked off in
    c.train.epochs = (
        22.0  # the paper's 2, over its 11 copies of the data with different history dropout
    )
    c.train.learning_rate = 1e-4
    c.train.weight_decay = 1e-4
    c.train.warmup = 0.05  # share of the steps
    c.train.clip_norm = 1.0
    c.train.own_items = 0  # so many of each user's history items are examples too
    c.train.remat = False  # recompute the LLM's activations in the backward pass
    c.train.log_every = 20
    c.train.checkpoint_every = 200
    c.train.keep = 2  # newest checkpoints
    # Share of the training examples that are held out: the checkpoint with the lowest loss on them
    # is kept and used. 0: the last is.
    c.train.validation = 0.0

    c.lora = ml_collections.ConfigDict()  # of the methods task_lora and user_lora
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.lora.user_epochs = 2  # over a user's own items
    c.lora.user_learning_rate = 1e-4

    c.tune = ml_collections.ConfigDict()  # before --mode=compare
    # Tried for every trained method and judged by train.validation; empty: train.learning_rate.
    c.tune.learning_rates = ()

    c.eval = ml_collections.ConfigDict()
    c.eval.batch_size = 64
    c.eval.num_beams = 4
    c.eval.length_penalty = 1.0
    c.eval.max_new_tokens = 128
    c.eval.top_k = 4  # demonstrations of the retrieval methods
    c.eval.bootstrap_samples = 2000

    c.mesh = ml_collections.ConfigDict()
    c.mesh.slices = 1  # TPU slices, or pods, that work together
    c.mesh.data = -1  # what the other axes leave
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    return c


def task_config(task: str, argument: str) -> ml_collections.ConfigDict:
    """The defaults for a task with the LLM that `configs/TASK.py:ARGUMENT` names."""
    c = base_config()
    c.task = task
    llms.use(c, argument)
    return c


def long_outputs(c: ml_collections.ConfigDict) -> None:
    """Lengths for outputs of several hundred words, as LongLaMP's; the paper has none."""
    c.data.time_based = False  # its two settings are data sets of their own
    c.data.max_input_length = 512
    c.data.max_target_length = 512
    c.eval.max_new_tokens = 512
    c.eval.batch_size = 16
