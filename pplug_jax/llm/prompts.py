"""Turn a task's texts into the LLM's tokens: [prefix] input [suffix] | answer [end].

The soft tokens stand in front of the input, after the prefix, or behind it, before the suffix. A
plain prompt's prefix is BOS, if the tokenizer has one, and its suffix a separator. With the
tokenizer's chat template the prefix is all that opens the user's turn, and the suffix all from the
turn's end to the beginning of the answer.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers

from pplug_jax.errors import InputError

# What chat templates may depend on besides the messages. Llama 3.2's writes today's date unless it
# is given one, and a prompt must not change overnight; Qwen 3's lets the model think first unless
# told not to, and the answer is what is trained.
TEMPLATE_SETTINGS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
USER, ANSWER = "USERTEXT", "ANSWERTEXT"  # stand for the texts while a template is read


class Front(NamedTuple):
    """Soft tokens in front of the input, as in the paper.

    Attributes:
        prefix_length: the number of the prompt's tokens in front of them.
    """

    prefix_length: int


class Behind(NamedTuple):
    """Soft tokens behind all of the prompt but its suffix.

    What a decoder-only LLM makes of the prompt then depends on no user.

    Attributes:
        suffix: the suffix' tokens.
    """

    suffix: tuple[int, ...]


Place = Front | Behind


class Turn(NamedTuple):
    """What a chat template writes around the user's text and the answer.

    Attributes:
        before: stands before the user's text.
        between: stands between it and the answer.
        behind: stands behind the answer.
    """

    before: str
    between: str
    behind: str


def read_template(tokenizer: transformers.PreTrainedTokenizerBase) -> Turn:
    """Return the tokenizer's chat template for one turn.

    Raises:
        InputError: the tokenizer has none, or one that does not hold each text exactly once.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat_template; give "
            "--config.llm.chat=False, or the instruction-tuned checkpoint"
        )

    def render(*messages: dict[str, str], answer: bool) -> str:
        try:
            settings = TEMPLATE_SETTINGS | {"add_generation_prompt": answer}
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))
        except Exception as error:  # a template is a program
            raise InputError(
                f"{tokenizer.name_or_path}: the chat_template fails: {error}; "
                "give --config.llm.chat=False"
            ) from error

    user, assistant = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    asked = render(user, answer=True).split(USER)
    answered = render(user, assistant, answer=False).split(ANSWER)
    if len(asked) != 2 or len(answered) != 2:
        raise InputError(
            f"{tokenizer.name_or_path}: the chat_template does not hold the user's text and the "
            "answer once each; give --config.llm.chat=False"
        )
    return Turn(asked[0], asked[1], answered[1])


class Tokenizer:
    """The LLM's tokenizer with the fixed parts of a prompt.

    Attributes:
        prefix: token ids before the input and the soft tokens.
        suffix: token ids between them and the answer.
        end: token ids behind the answer.
        joint: the text between an input and soft tokens behind it, which servers put between the
            parts of a chat message (vLLM, with a template of strings).
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        eos_ids: Sequence[int] | None = None,
        *,
        vocab_size: int = sys.maxsize,
        separator: str = "",
        prompt_end: Sequence[int] = (),
        chat: bool = False,
    ):
        """Split a prompt into its fixed parts.

        Args:
            tokenizer: the LLM's tokenizer.
            eos_ids: the tokens at which the LLM's generation stops; None is the tokenizer's end.
            vocab_size: rows of the LLM's embedding table.
            separator: stands between input and answer of a plain prompt.
            prompt_end: the tokens that close a plain prompt; most LLMs have none.
            chat: use the tokenizer's chat template.

        Raises:
            InputError: the chat template is missing or cannot be used, no token ends an answer at
                which generation stops, or a fixed part has a token that the LLM lacks.
        """
        self.tokenizer = tokenizer
        special = {*getattr(tokenizer, "all_special_ids", ())}
        self.meant = special - {getattr(tokenizer, "unk_token_id", None)}
        text_end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stops = text_end if eos_ids is None else list(eos_ids)
        if chat:
            turn = read_template(tokenizer)
            self.prefix, self.suffix, closing = map(self._template_ids, turn)
            self.joint = "\n"
            # Llama 2 writes a blank before its end-of-sequence token.
            self.end = [token for token in closing if token in self.stops][:1]
            if not self.end:
                raise self._never_stops(f"the chat_template ends an answer with {turn.behind!r}")
        else:
            self.prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            self.suffix = [*self.ids(separator), *prompt_end]
            self.joint = ""
            self.end = self._end_of_sequence(text_end)
        fixed = {"prefix": self.prefix, "suffix": self.suffix, "end": self.end}
        for part, ids in fixed.items():
            if beyond := [token for token in ids if not 0 <= token < vocab_size]:
                token = tokenizer.convert_ids_to_tokens(beyond[0]) if beyond[0] >= 0 else None
                raise InputError(
                    f"{tokenizer.name_or_path}: the prompt's {part} has the token {token!r} with "
                    f"id {beyond[0]}, but the "
                    f"LLM's embedding table has {vocab_size} rows: they do not belong together"
                )

    def _end_of_sequence(self, text_end: list[int]) -> list[int]:
        """Return the end of a plain target, if any: the tokenizer's or another special stop."""
        if not text_end or text_end[0] in self.stops:
            return text_end or self.stops[:1]
        special = [token for token in self.stops if token in self.tokenizer.all_special_ids]
        if not special:
            name = self.tokenizer.convert_ids_to_tokens(text_end[0])
            raise self._never_stops(f"the tokenizer ends a text with {name!r}")
        return special[:1]

    def _never_stops(self, end: str) -> InputError:
        stops = self.tokenizer.convert_ids_to_tokens(self.stops) or "no token"
        return InputError(
            f"{self.tokenizer.name_or_path}: {end}, where generation does not stop (it does at "
            f"{stops}): name that token in eos_token_id of generation_config.json"
        )

    def _template_ids(self, text: str) -> list[int]:
        """Return the tokens of the template's text, in which special tokens are meant."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        """Return the text's tokens; special tokens that a user writes are read as plain text."""
        ids = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        # T5's are pieces of its vocabulary, so that no option has them read as text.
        return [token for token in ids if token not in self.meant]

    def place(self, behind: bool) -> Place:
        """Return where soft tokens stand: behind the input or in front of it."""
        return Behind(tuple(self.suffix)) if behind else Front(len(self.prefix))

    def prompt(self, text: str, max_length: int, behind: bool = False) -> np.ndarray:
        """Return at most `max_length` tokens of `text`, between prefix and suffix.

        Args:
            text: the input.
            max_length: the most tokens of the text.
            behind: end the prompt where soft tokens behind it begin.
        """
        ids = self.ids(text)
        if not behind:
            return np.array([*self.prefix, *ids[:max_length], *self.suffix], np.int32)
        if len(ids) <= max_length:
            ids = self.ids(text + self.joint)  # its tokens may reach into the text
        else:
            ids = [*ids[:max_length], *self.ids(self.joint)]
        return np.array([*self.prefix, *ids], np.int32)

    def target(self, text: str, max_length: int) -> np.ndarray:
        """Return at most `max_length` tokens, the end-of-sequence token included."""
        return np.array([*self.ids(text)[: max_length - len(self.end)], *self.end], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Return generated tokens as text, up to the first at which generation stops."""
        ends = np.flatnonzero(np.isin(tokens, self.stops))
        tokens = tokens[: ends[0]] if len(ends) else tokens
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def layout(self, soft_tokens: int, behind: bool = False) -> str:
        """Show people what the LLM reads: fixed parts as they are, line breaks escaped."""

        def escaped(text: str) -> str:
            return json.dumps(text, ensure_ascii=False)[1:-1]

        def shown(ids: list[int]) -> str:
            return escaped(str(self.tokenizer.decode(ids)))

        soft = f"[{soft_tokens} soft tokens]"
        body = f"[input]{escaped(self.joint)} {soft}" if behind else f"{soft} [input]"
        return f"{shown(self.prefix)}{body}{shown(self.suffix)} | [answer]{shown(self.end)}"
