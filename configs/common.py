"""What the configs of all tasks share; the defaults are the paper's where it states them."""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import llms
from pplug_jax.data.download import BASE_URL


def base_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0  # of a single run
    c.seeds = (0, 1, 2)  # of --mode=compare, where `seed` still draws the embedded sample
    # Plugs with other settings, under names for `methods`:
    # "{'k16': {'plug.num_persona_tokens': 16}}".
    c.variants = ""
    c.task = ""  # a row of data/tasks.py
    c.parity = False  # do as the official code does where we do otherwise: docs/notes/parity.md
    # Methods to run, rows of methods/table.py, or names of `variants`.
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
    c.data.time_based = True  # LaMP split by time, the paper's setting; False: by user
    c.data.base_url = BASE_URL  # where --mode=download gets LaMP's files
    c.data.on_error = "stop"  # at a bad record; skip: list it in WORKDIR/bad_records.jsonl
    # Name of the split to train on, as in the files; train[:300] is its first 300 records.
    c.data.train_split = "train"
    c.data.eval_split = "dev"  # name of the split to answer
    c.data.sample_train_users = 0  # users of the embedded sample to train on
    c.data.sample_eval_users = 0  # users of the embedded sample to answer for
    c.data.max_input_length = 256  # the LLM's tokens of the input, demonstrations included
    c.data.max_target_length = 128  # the LLM's tokens of the output
    c.data.max_history = 512  # newest items of a profile that are read
    c.data.sort_by_date = True  # order profiles by date, where all their items have one
    c.data.history_labels = True  # read a history item with its tag or score, where it has one
    # Of `custom`, the field of an item that is what the output is: title, label or text; empty: the
    # title, where all items have one and the outputs are as short.
    c.data.answer = ""
    c.data.instruction = ""  # of `custom`, what every input begins with; empty: as the data say
    c.data.buckets = 6  # padded lengths of texts; more pad less, and compile more programs
    # Directory on a disk for the history's vectors; empty: WORKDIR/history, or history/ where the
    # workdir is gs://...
    c.data.history_store = ""

    c.llm = ml_collections.ConfigDict()
    c.llm.path = ""  # directory, URL (gs://...), hub id or .gguf file; assets/NAME is bundled
    c.llm.dtype = "bfloat16"  # of weights and computation
    c.llm.quantize = ""  # store the frozen kernels as int8 or int4
    c.llm.converted = ""  # where --mode=convert writes the LLM, also gs://; empty: WORKDIR/llm
    c.llm.chat = False  # use the tokenizer's chat template
    c.llm.separator = "\n"  # between input and answer, without a chat template

    c.encoder = ml_collections.ConfigDict()
    c.encoder.path = ""  # directory, URL or hub id of a BERT-style encoder
    c.encoder.pooling = ""  # cls or mean; empty: as the encoder's directory says
    # In front of every input, such as "query: " for E5; None: as the encoder's directory says.
    c.encoder.query_prefix = placeholder(str)
    # In front of every history text, such as "passage: " for E5; None: as the directory says.
    c.encoder.item_prefix = placeholder(str)
    c.encoder.max_length = 512  # tokens of a text that are read
    c.encoder.dtype = "float32"  # of the history encoder
    c.encoder.batch_size = 64  # history texts encoded at a time

    c.plug = ml_collections.ConfigDict()
    # Where the soft tokens stand: `front` of the input, as in the paper, or `behind` it. Behind, a
    # decoder-only LLM has less to do, for what it makes of the input depends on no user.
    c.plug.place = "front"
    c.plug.num_persona_tokens = 1  # k; 1 is the paper
    c.plug.projector_size = 0  # the persona projector's hidden units; 0: the LLM's width, the paper
    c.plug.temperature = 1.0  # of the attention over the history; 1 is the paper
    c.plug.learned_temperature = False  # train the temperature from there
    c.plug.recency = False  # learn to weigh older items less, in profiles with dates
    # k more tokens for each feature: `form`, how the user writes (capitals, punctuation, length);
    # `difference`, how the items differ from other users' items on similar topics.
    c.plug.features = ()
    # The input encoder's learning rate over the others'; 1 is the paper, 0 freezes it.
    c.plug.encoder_rate = 1.0
    c.plug.history_dropout = 0.5  # largest share of a history that training leaves out
    c.plug.persona_dropout = 0.0  # share of training examples that get the null persona
    c.plug.dtype = "float32"  # of the computation; parameters are always float32

    c.train = ml_collections.ConfigDict()
    c.train.batch_size = 64  # examples a step
    c.train.accumulation = 1  # parts that a batch is split into, to save memory
    # The paper's 2, over its 11 copies of the data with different history dropout.
    c.train.epochs = 22.0
    c.train.learning_rate = 1e-4  # of AdamW, after warm-up
    c.train.weight_decay = 1e-4  # of AdamW
    c.train.warmup = 0.05  # share of the steps
    c.train.clip_norm = 1.0  # largest norm of the gradient
    c.train.own_items = 0  # number of each user's history items that become examples too
    c.train.remat = False  # recompute the LLM's activations in the backward pass, to save memory
    # At a loss far above where it began and the LLM's own: `stop`, or go `back` to the last
    # checkpoint and end the method's training with it.
    c.train.on_divergence = "stop"
    c.train.log_every = 20  # steps
    c.train.checkpoint_every = 200  # steps
    c.train.keep = 2  # newest checkpoints
    # Share of the training users that are held out: the checkpoint with the lowest loss on them is
    # used. 0: the last checkpoint is.
    c.train.validation = 0.0

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 8  # of task_lora and user_lora
    c.lora.alpha = 16.0  # the update is alpha / rank * A B
    c.lora.user_epochs = 2  # of user_lora, over a user's own items
    c.lora.user_learning_rate = 1e-4  # of user_lora

    c.tune = ml_collections.ConfigDict()  # before --mode=compare
    # Learning rates tried for every trained method and judged by train.validation; empty: only
    # train.learning_rate.
    c.tune.learning_rates = ()

    c.eval = ml_collections.ConfigDict()
    c.eval.batch_size = 64  # examples answered at a time
    c.eval.num_beams = 4  # beams; 1 is greedy
    c.eval.length_penalty = 1.0  # of beam search
    c.eval.max_new_tokens = 128  # longest answer
    c.eval.top_k = 4  # demonstrations of the retrieval methods
    c.eval.bootstrap_samples = 2000  # for intervals and p-values

    c.mesh = ml_collections.ConfigDict()
    c.mesh.slices = 1  # TPU slices, or pods, that work together
    c.mesh.data = -1  # devices that split the batch; -1: what the other axes leave
    c.mesh.fsdp = 1  # devices that split the batch and the weights
    c.mesh.tensor = 1  # devices that split every layer
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
