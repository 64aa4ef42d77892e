"""Real LLMs against transformers: logits and answers of a left-padded batch.

`PPLUG_TEST_MODELS` names the directory that holds them.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from pplug_jax.llm import load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.generate import generate
from tests.support.parity import assert_close, needs_torch, torch

LAST = 8  # places whose logits are compared: those of 262,144 tokens at all places are gigabytes
T = 16  # tokens of an answer
SHORT = "Write a title for a note about the ferry: from May it sails twice a day."
# Numbered, so that a long text does not only repeat itself.
LONG = " ".join(f"{i}. Boat {7 * i % 31} was seen at pier {i * i % 17}." for i in range(90))


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(
    ("name", "length"), [("smollm2_135m_instruct", 200), ("gemma3_270m", 1000)]
)
def test_logits_and_answers_of_a_left_padded_batch(
    real_model: Callable[[str], Path], name: str, length: int
) -> None:
    path = real_model(name)
    llm = load_llm(path, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    rows = [tokenizer(text)["input_ids"] for text in (LONG, SHORT)]
    rows[0] = rows[0][:length]
    assert len(rows[0]) == length > (llm.config.window or 0)
    mask = np.arange(length) >= length - np.array([[len(row)] for row in rows])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    inputs = {
        "input_ids": torch.tensor(tokens).long(),
        "attention_mask": torch.tensor(mask).long(),
    }
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = model(**inputs, position_ids=positions, logits_to_keep=LAST).logits.numpy()

    @jax.jit
    def last_logits(llm: Decoder, tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
        return llm.unembed(llm.hidden(llm.embed(tokens), mask)[:, -LAST:])

    assert_close(last_logits(llm, tokens, mask), theirs, 3e-4)
    for beams in (1, 4):
        ours = np.asarray(generate(llm, llm.embed(tokens), mask, max_new_tokens=T, num_beams=beams))
        expected = model.generate(
            **inputs, max_new_tokens=T, do_sample=False, early_stopping=False, num_beams=beams
        )[:, length:].numpy()
        np.testing.assert_array_equal(ours[:, : expected.shape[1]], expected)
        assert (ours[:, expected.shape[1] :] == llm.config.pad_id).all()
