"""The frozen LLMs that a task's config offers, as `configs/TASK.py:NAME` or `:NAME@SLICE`.

Without a name it is the bundled tiny one, which needs no download and has learnt little.
"""

from typing import NamedTuple

import ml_collections


class Preset(NamedTuple):
    """path: hub id. chat: with its chat template. max_input_length: tokens of an input.

    v5e_8, v5p_16: how many of the slice's 8 chips (16 and 95 GiB each; v5p counts two cores a chip)
    share one copy of the weights; None where all of them together are too small. docs/pods.md has
    the plans, most with room for fewer. v5e_8_accumulation: parts of a batch, for room there.
    learning_rate: the paper's; it was found for FlanT5-XXL.
    """

    path: str
    chat: bool
    max_input_length: int
    v5e_8: int | None
    v5p_16: int
    learning_rate: float = 1e-4
    v5e_8_accumulation: int = 1


PRESETS = {
    "gemma3_1b": Preset("google/gemma-3-1b-it", True, 512, 1, 1),
    "gemma3_4b": Preset("google/gemma-3-4b-it", True, 512, 4, 1),
    "gemma3_12b": Preset("google/gemma-3-12b-it", True, 512, 8, 1),
    "gemma3_27b": Preset("google/gemma-3-27b-it", True, 512, 8, 1, v5e_8_accumulation=2),
    "gemma2_9b": Preset("google/gemma-2-9b-it", True, 512, 8, 1),
    "llama3_1b": Preset("meta-llama/Llama-3.2-1B-Instruct", True, 512, 1, 1),
    "llama3_8b": Preset("meta-llama/Llama-3.1-8B-Instruct", True, 512, 8, 1),
    "llama3_70b": Preset("meta-llama/Llama-3.3-70B-Instruct", True, 512, None, 2),
    "qwen3_8b": Preset("Qwen/Qwen3-8B", True, 512, 8, 1),
    "flan_t5_base": Preset("google/flan-t5-base", False, 256, 1, 1),
    "flan_t5_xxl": Preset("google/flan-t5-xxl", False, 256, 8, 1),  # the paper
}
SLICES = {"v5e-8": "v5e_8", "v5p-16": "v5p_16"}


def use(c: ml_collections.ConfigDict, argument: str) -> None:
    """Sets what `argument`, a preset's name with or without @SLICE, or `embedded`, says.

    Raises:
        ValueError: an unknown name or slice.
    """
    if argument == "embedded":
        c.llm.path = "assets/tiny_llama"
        c.llm.dtype = "float32"
        c.encoder.path = "assets/tiny_bert"
        c.encoder.max_length = 64
        return
    name, _, machine = argument.partition("@")
    for given, known in ((name, ["embedded", *PRESETS]), (machine, ["", *SLICES])):
        if given not in known:
            raise ValueError(f"{argument}: {given!r} is unknown; known: {', '.join(known)}")
    preset = PRESETS[name]
    c.llm.path = preset.path
    c.llm.chat = preset.chat
    c.llm.separator = ""
    c.data.max_input_length = preset.max_input_length
    c.train.learning_rate = preset.learning_rate
    c.train.remat = True
    c.plug.dtype = "bfloat16"
    c.encoder.path = "BAAI/bge-base-en-v1.5"
    # BGE's own; the official code has it too, for inputs alone and without the blank at its end.
    c.encoder.query_prefix = "Represent this sentence for searching relevant passages: "
    c.encoder.dtype = "bfloat16"
    if machine:
        copies = getattr(preset, SLICES[machine])
        if copies is None:
            raise ValueError(f"{argument}: {name} does not fit a {machine}; see docs/pods.md")
        c.mesh.fsdp = copies
        if machine == "v5e-8":
            c.train.accumulation = preset.v5e_8_accumulation
