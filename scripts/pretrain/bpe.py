"""Byte-level BPE tokenizers made from texts."""

from collections.abc import Iterable

import tokenizers
import transformers


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: dict[str, str], template: str | None = None
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` entries that never meets an unknown character.

    special: role (`bos_token`, ...) -> token; they get the ids from 0 in this order.
    template: how a single text is framed, as `tokenizers`' TemplateProcessing has it.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template,
            special_tokens=[(token, i) for i, token in enumerate(special.values())],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
