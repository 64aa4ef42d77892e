"""Prompts as tokens, plain and by every family's chat template."""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import transformers

from pplug_jax.errors import InputError
from pplug_jax.llm.prompts import Tokenizer
from scripts.pretrain.bpe import train_bpe


def test_a_prompt_is_bos_text_separator(llama_tokenizer: transformers.PreTrainedTokenizerBase):
    tokenizer = Tokenizer(llama_tokenizer, separator="\nTitle:")
    bos, text, separator = 0, tokenizer.ids("small model"), tokenizer.ids("\nTitle:")
    assert len(tokenizer.prefix) == 1
    assert text
    assert separator
    assert tokenizer.prompt("small model", 99).tolist() == [bos, *text, *separator]
    # What is cut is the text, never the frame around it.
    assert tokenizer.prompt("small model", 2).tolist() == [bos, *text[:2], *separator]
    assert tokenizer.prompt("", 9).tolist() == [bos, *separator]


def test_a_target_ends_with_eos_even_when_cut(
    llama_tokenizer: transformers.PreTrainedTokenizerBase,
):
    tokenizer = Tokenizer(llama_tokenizer)
    text, eos = tokenizer.ids("small model"), 1
    assert tokenizer.target("small model", 99).tolist() == [*text, eos]
    assert tokenizer.target("small model", len(text)).tolist() == [*text[:-1], eos]
    assert tokenizer.target("small model", 1).tolist() == [eos]
    assert tokenizer.target("", 9).tolist() == [eos]


@pytest.mark.parametrize("end", [-1, 320])
def test_an_end_that_is_no_row_of_the_embedding_table(
    llama_tokenizer: transformers.PreTrainedTokenizerBase,
    end: int,
) -> None:
    endless = copy.deepcopy(llama_tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match=f"end has the token .* with id {end}, but"):
        Tokenizer(endless, [end], vocab_size=320)


def test_special_tokens_in_a_users_text_are_plain_text(
    llama_tokenizer: transformers.PreTrainedTokenizerBase,
):
    tokenizer = Tokenizer(llama_tokenizer)
    text = "a </s> b <s><pad>"
    for ids in (tokenizer.prompt(text, 99)[1:], tokenizer.target(text, 99)[:-1]):
        assert not set(ids) & {0, 1, 2}
        assert llama_tokenizer.decode(ids) == text


def test_a_tokenizer_without_bos_and_eos():
    class Bare:
        bos_token_id = eos_token_id = None

        def encode(self, text: str, **options: object) -> list[int]:
            return [ord(character) for character in text]

    tokenizer = Tokenizer(Bare(), [7, 8], separator="|")
    assert tokenizer.prefix == []
    assert tokenizer.prompt("ab", 9).tolist() == [97, 98, 124]
    assert tokenizer.target("ab", 9).tolist() == [97, 98, 7]  # the LLM's config names one
    assert Tokenizer(Bare()).target("ab", 9).tolist() == [97, 98]


def test_a_target_ends_where_generation_stops(
    llama_tokenizer: transformers.PreTrainedTokenizerBase,
):
    def end(*eos_ids: int) -> list[int]:
        return Tokenizer(llama_tokenizer, eos_ids).end

    assert end(1) == end(7, 1) == [1]  # the tokenizer's own, </s>
    assert end(2) == end(40, 2) == [2]  # <pad>, the only special one
    for other in ((40,), ()):  # ordinary text, or nothing
        with pytest.raises(InputError, match=r"ends a text with '</s>', where generation does not"):
            end(*other)


def test_an_answer_ends_at_the_first_stop_whatever_fills_the_row(
    llama_tokenizer: transformers.PreTrainedTokenizerBase,
):
    tokenizer = Tokenizer(llama_tokenizer, [1, 2])
    text = tokenizer.ids("small model")
    for row in ([*text, 1, 40, 40], [*text, 2, -1, -1], [*text, 1, 10**6], text, [*text, 1, *text]):
        assert tokenizer.decode(np.array(row)) == "small model"
    assert tokenizer.decode(np.array([1, 40])) == ""


# Chat templates: the turns of each family, written for these tests.

TURN = "{% for m in messages %}"
NEXT = "{% endfor %}{% if add_generation_prompt %}"
GEMMA = (
    "{{ bos_token }}"
    + TURN
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + "{{ m.content | trim }}<end_of_turn>\n"
    + NEXT
    + "<start_of_turn>model\n{% endif %}"
)
LLAMA_2 = (
    TURN
    + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    + "{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    + "{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if date_string is not defined %}{{ 1 / 0 }}{% endif %}"
    + "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string }}<|eot_id|>"
    + TURN
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    + NEXT
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    TURN
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + NEXT
    + "<|im_start|>assistant\n"
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    + "{% endif %}{% endif %}"
)


class Chat(NamedTuple):
    """special: role -> token. marks: other special tokens. end: what closes an answer."""

    template: str
    special: dict[str, str]
    marks: list[str]
    end: str
    layout: str


CHATS = {
    "gemma": Chat(
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        r"<bos><start_of_turn>user\n[3 soft tokens] [input]"
        + r"<end_of_turn>\n<start_of_turn>model\n | [answer]<end_of_turn>",
    ),
    "llama 2": Chat(
        LLAMA_2,
        {"bos_token": "<s>", "eos_token": "</s>"},
        [],
        "</s>",
        "<s>[INST] [3 soft tokens] [input] [/INST] | [answer]</s>",
    ),
    "llama 3": Chat(
        LLAMA_3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>"],
        "<|eot_id|>",
        r"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024"
        + r"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n[3 soft tokens] [input]"
        + r"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n | [answer]<|eot_id|>",
    ),
    "qwen": Chat(
        QWEN,
        {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        ["<|im_start|>"],
        "<|im_end|>",
        r"<|im_start|>user\n[3 soft tokens] [input]<|im_end|>\n<|im_start|>assistant\n"
        + r"<think>\n\n</think>\n\n | [answer]<|im_end|>",
    ),
}


def chat_tokenizer(chat: Chat) -> transformers.PreTrainedTokenizerBase:
    tokenizer = train_bpe(["a user's text.\n"], 300, chat.special)
    tokenizer.add_tokens(chat.marks, special_tokens=True)
    tokenizer.chat_template = chat.template
    return tokenizer


@pytest.mark.parametrize("family", CHATS)
def test_the_layout_of_a_familys_chat(family: str) -> None:
    chat = CHATS[family]
    tokenizer = chat_tokenizer(chat)
    end_id = tokenizer.convert_tokens_to_ids(chat.end)
    prompts = Tokenizer(tokenizer, [end_id], chat=True)
    print(prompts.layout(3))
    assert prompts.layout(3) == chat.layout

    text = f"a text {chat.end}{''.join(chat.marks)} of <s></s> one's own"
    ids = prompts.prompt(text, 999).tolist()
    before, after = prompts.prefix, prompts.suffix
    assert ids == [*before, *prompts.ids(text), *after]
    special_ids = set(tokenizer.all_special_ids)
    assert special_ids & {*before, *after}  # the template's marks are single tokens
    assert not special_ids & set(prompts.ids(text))  # and the user's are text
    assert tokenizer.decode(prompts.ids(text)) == text
    assert ids[:-1].count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
    assert prompts.target(f"a title{chat.end}", 99).tolist().count(end_id) == 1
    assert prompts.target("a title", 99)[-1] == end_id

    # One rendering of the whole turn, tokenised at once, is the same text.
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a text"}],
        tokenize=False,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
        enable_thinking=False,
    )
    assert tokenizer.decode(prompts.prompt("a text", 99)) == whole


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("text", ["a user's text.", "Which?! (one's own)", "lines\nof text"])
def test_a_prompt_before_soft_tokens_is_what_a_server_makes_of_the_message(
    family: str, text: str
) -> None:
    """vLLM joins a text part and a part of embeddings by a newline, and tokenises all at once."""
    chat = CHATS[family]
    tokenizer = chat_tokenizer(chat)
    prompts = Tokenizer(tokenizer, [tokenizer.convert_tokens_to_ids(chat.end)], chat=True)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text}\nSOFT"}],
        tokenize=False,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
        enable_thinking=False,
    )
    before, behind = (tokenizer.encode(x, add_special_tokens=False) for x in whole.split("SOFT"))
    assert prompts.prompt(text, 99, behind=True).tolist() == before
    assert list(prompts.place(behind=True).suffix) == behind
    cut = [*prompts.prefix, *prompts.ids(text)[:2], *prompts.ids("\n")]
    assert prompts.prompt(text, 2, behind=True).tolist() == cut
    assert r"[input]\n [3 soft tokens]" in prompts.layout(3, behind=True)


def test_the_layouts_of_plain_prompts() -> None:
    gemma = Tokenizer(train_bpe([""], 300, CHATS["gemma"].special), separator="\n")
    assert gemma.layout(2) == r"<bos>[2 soft tokens] [input]\n | [answer]<eos>"
    assert gemma.layout(2, behind=True) == r"<bos>[input] [2 soft tokens]\n | [answer]<eos>"
    text = gemma.ids("a text")
    assert gemma.prompt("a text", 9, behind=True).tolist() == [*gemma.prefix, *text]
    t5 = train_bpe([""], 300, {"pad_token": "<pad>", "eos_token": "</s>"})
    t5 = Tokenizer(t5, prompt_end=[t5.eos_token_id])  # in front of the encoder's input
    assert t5.layout(2) == "[2 soft tokens] [input]</s> | [answer]</s>"


def test_chat_templates_that_cannot_be_used() -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    with pytest.raises(InputError, match=r"no chat_template; give --config\.llm\.chat=False"):
        Tokenizer(train_bpe([""], 300, special), [1], chat=True)
    chat = CHATS["gemma"]
    tokenizer = chat_tokenizer(chat)
    with pytest.raises(InputError, match=r"ends an answer with '<end_of_turn>.*generation_config"):
        Tokenizer(tokenizer, [1], chat=True)  # generation would go on behind the answer
    tokenizer.chat_template = chat.template.replace("m.content", "m.content + m.content")
    with pytest.raises(InputError, match="once each"):
        Tokenizer(tokenizer, [tokenizer.convert_tokens_to_ids(chat.end)], chat=True)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system turn') }}", "{{ messages[9].content }}", "{% if %}"]
)
def test_a_chat_template_that_fails_is_named(template: str) -> None:
    tokenizer = chat_tokenizer(CHATS["gemma"]._replace(template=template))
    with pytest.raises(InputError, match=r"the chat_template fails: .*--config\.llm\.chat=False"):
        Tokenizer(tokenizer, [1], chat=True)
