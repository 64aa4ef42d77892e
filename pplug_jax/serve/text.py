"""Tokens as text, as they come."""

from collections.abc import Callable, Sequence


class TextStream:
    """The text of a growing list of tokens, up to a stop string.

    As `Tokenizer.decode` gives it at the end, without blanks around it. What may still change or
    vanish is held back: half a character, blanks at the end, the beginning of a stop string.

    Args:
        decode: turns tokens into text.
        stops: texts at which the answer ends; they are not part of it.

    Attributes:
        text: what was told so far.
        stopped: whether a stop string was met.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Return what is new for certain with one more token."""
        self._tokens.append(token)
        return self._tell(last=False)

    def end(self) -> str:
        """Return what was held back, as no more tokens come."""
        return "" if self.stopped else self._tell(last=True)

    def _tell(self, *, last: bool) -> str:
        text = self._decode(self._tokens).lstrip()
        ends = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        elif not last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._begun(text)]
        text = text.rstrip()
        if not text.startswith(self.text):  # the tokenizer changed its mind; the rest may fit again
            return ""
        new = text[len(self.text) :]
        self.text = text
        return new

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of the text may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
