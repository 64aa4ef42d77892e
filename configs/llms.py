"""The frozen LLMs that a task's config offers, as `configs/TASK.py:NAME` or `:NAME@SLICE`.

Without a name it is the bundled tiny one, which needs no download and has learnt little.
"""

from typing import NamedTuple

import ml_collections

from pplug_jax.runtime.slips import near


class Layout(NamedTuple):
    """How a preset trains 64 rows on 8 chips: the fastest way that docs/notes/tpu.md plans.

    fsdp: chips that share one copy of the weights. accumulation: parts that the rows are worked off
    in. remat: forward passes are made twice, where there is no room for what they would leave.
    """

    fsdp: int
    accumulation: int = 1
    remat: bool = False


class Preset(NamedTuple):
    """path: hub id. chat: with its chat template. max_input_length: tokens of an input.

    v5e_8, v5p_16: its layout on 8 chips of 16 GiB, and on 8 of 95 GiB (v5p counts two cores a
    chip); None where all of them together are too small.
    learning_rate: the paper's; it was found for FlanT5-XXL.
    """

    path: str
    chat: bool
    max_input_length: int
    v5e_8: Layout | None
    v5p_16: Layout
    learning_rate: float = 1e-4


def _instruct(path: str, v5e_8: Layout | None, v5p_16: Layout) -> Preset:
    return Preset(path, True, 512, v5e_8, v5p_16)


def _flan(path: str, v5e_8: Layout, v5p_16: Layout) -> Preset:
    return Preset(path, False, 256, v5e_8, v5p_16)


PRESETS = {
    "smollm2_135m": _instruct("HuggingFaceTB/SmolLM2-135M-Instruct", Layout(1), Layout(1)),
    "smollm2_360m": _instruct("HuggingFaceTB/SmolLM2-360M-Instruct", Layout(1), Layout(1)),
    "smollm2_1b7": _instruct("HuggingFaceTB/SmolLM2-1.7B-Instruct", Layout(1), Layout(1)),
    "gemma3_270m": _instruct("google/gemma-3-270m-it", Layout(1), Layout(1)),
    "gemma3_1b": _instruct("google/gemma-3-1b-it", Layout(1), Layout(1)),
    "gemma3_4b": _instruct("google/gemma-3-4b-it", Layout(4, 2), Layout(1)),
    "gemma3_12b": _instruct("google/gemma-3-12b-it", Layout(8, 4), Layout(1)),
    "gemma3_27b": _instruct(
        "google/gemma-3-27b-it", Layout(8, 2, remat=True), Layout(1, remat=True)
    ),
    "gemma2_9b": _instruct("google/gemma-2-9b-it", Layout(8, 4), Layout(1)),
    "llama3_1b": _instruct("meta-llama/Llama-3.2-1B-Instruct", Layout(1), Layout(1)),
    "llama3_8b": _instruct("meta-llama/Llama-3.1-8B-Instruct", Layout(8, 2), Layout(1)),
    "llama3_70b": _instruct("meta-llama/Llama-3.3-70B-Instruct", None, Layout(2, remat=True)),
    "qwen3_0b6": _instruct("Qwen/Qwen3-0.6B", Layout(1), Layout(1)),
    "qwen3_8b": _instruct("Qwen/Qwen3-8B", Layout(8, 2), Layout(1)),
    "flan_t5_base": _flan("google/flan-t5-base", Layout(1), Layout(1)),
    "flan_t5_xxl": _flan("google/flan-t5-xxl", Layout(8), Layout(1)),  # the paper
}
SLICES = {"v5e-8": "v5e_8", "v5p-16": "v5p_16"}
LAPTOP = "cpu"  # another machine than the slices


def use(c: ml_collections.ConfigDict, argument: str) -> None:
    """Sets what `argument`, a preset's name with or without @SLICE or @cpu, or `embedded`, says.

    Raises:
        ValueError: an unknown name or machine.
    """
    if argument == "embedded":
        c.llm.path = "assets/tiny_llama"
        c.llm.dtype = "float32"
        c.encoder.path = "assets/tiny_bert"
        c.encoder.max_length = 64
        return
    name, _, machine = argument.partition("@")
    for given, known in ((name, ["embedded", *PRESETS]), (machine, ["", *SLICES, LAPTOP])):
        if given not in known:
            names = ", ".join(filter(None, known))
            raise ValueError(f"{given!r} is unknown{near(given, known)}; known: {names}")
    preset = PRESETS[name]
    c.llm.path = preset.path
    c.llm.chat = preset.chat
    if not preset.chat:
        c.llm.separator = ""  # as T5 was trained
    c.data.max_input_length = preset.max_input_length
    c.train.learning_rate = preset.learning_rate
    c.train.remat = True  # it fits most
    c.plug.dtype = "bfloat16"
    c.encoder.path = "BAAI/bge-base-en-v1.5"
    # BGE's own; the official code has it too, for inputs alone and without the blank at its end.
    c.encoder.query_prefix = "Represent this sentence for searching relevant passages: "
    c.encoder.dtype = "bfloat16"
    if machine == LAPTOP:
        _laptop(c)
    elif machine:
        layout = getattr(preset, SLICES[machine])
        if layout is None:
            raise ValueError(f"{argument}: {name} does not fit a {machine}; see docs/notes/tpu.md")
        c.mesh.fsdp = layout.fsdp
        c.train.accumulation, c.train.remat = layout.accumulation, layout.remat


def _laptop(c: ml_collections.ConfigDict) -> None:
    """Sets what lets a small LLM train on a few CPU cores within an hour: short texts, MiniLM.

    The learning rate is that of SmolLM2-135M in docs/results.md.
    """
    c.llm.dtype = c.plug.dtype = c.encoder.dtype = "float32"
    c.encoder.path = "sentence-transformers/all-MiniLM-L6-v2"
    c.encoder.query_prefix = None
    c.encoder.max_length = 128
    c.data.max_input_length = 256
    c.data.max_target_length = 32
    c.data.max_history = 30
    c.data.buckets = 2
    c.train.batch_size = 16
    c.train.epochs = 4.0
    c.train.learning_rate = 3e-3
    c.train.remat = False
    c.train.prompt_cache = 6.0  # a few hundred of SmolLM2's
    c.eval.batch_size = 16
    c.eval.num_beams = 1
    c.eval.max_new_tokens = 24
    c.eval.top_k = 2
