"""The bodies of requests, in OpenAI's form, and what of it is not supported."""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pplug_jax.errors import InputError
from pplug_jax.serve.engine import Sampling

MOST_CHOICES = 16
# Fields that clients send and that change nothing here.
IGNORED = ("safety_identifier", "prompt_cache_key", "service_tier", "store", "parallel_tool_calls")
# What a field may say that is not supported: what it says by default.
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {}, {"type": "text"}, "none", "auto")


class Explain(BaseModel):
    """The field `persona` of a request."""

    model_config = ConfigDict(extra="forbid")
    explain: bool = False


class StreamOptions(BaseModel):
    include_usage: bool = False


class Ask(BaseModel):
    """What a chat and a completion have in common."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    persona: Explain = Explain()
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, max_length=1000)
    n: int = Field(1, ge=1, le=MOST_CHOICES)

    def check(self) -> None:
        """Refuse what is not supported.

        Raises:
            InputError: names the field.
        """
        for field, value in (self.model_extra or {}).items():
            if field not in IGNORED and value not in NEUTRAL:
                raise InputError(f"the field {field!r} is not supported; leave it out")
        if len(self.stops) > 4:
            raise InputError("'stop' has more than 4 texts")

    @property
    def name(self) -> str | None:
        """The persona's name."""
        named = self.user if self.user is not None else (self.metadata or {}).get("persona")
        if named is not None and not isinstance(named, str):
            raise InputError("'metadata.persona' must be a text")
        return named or None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def samplings(self, most: int) -> list[Sampling]:
        """Return the sampling of each choice; the default is greedy, as in evaluation.

        Args:
            most: the tokens of an answer, if the request does not say.
        """
        seed = secrets.randbits(31) if self.seed is None else self.seed
        return [
            Sampling(
                self.max_tokens or most,
                self.temperature or 0.0,
                1.0 if self.top_p is None else self.top_p,
                (seed + choice) % 2**31,
            )
            for choice in range(self.n)
        ]


class Message(BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = None


class Chat(Ask):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    def text(self) -> str:
        """Return the one user message that plugs are trained on.

        Raises:
            InputError: there are others.
        """
        if [message.role for message in self.messages] != ["user"]:
            raise InputError(
                "'messages' must be one message of the user: a plug is trained on the task's input "
                "alone, instruction included; put what a system message says into it"
            )
        content = self.messages[0].content
        if isinstance(content, str):
            return content
        parts = content or []
        if not parts or any(
            part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts
        ):
            raise InputError("'messages': the content must be a text, or parts of type 'text'")
        return "\n".join(part["text"] for part in parts)

    def samplings(self, most: int) -> list[Sampling]:
        return super().samplings(self.max_completion_tokens or most)


class Completion(Ask):
    """The body of /v1/completions."""

    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=0)

    def text(self) -> str:
        """Return the prompt.

        Raises:
            InputError: there are several.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise InputError("'prompt' must be one text; ask again for each of several")
        return self.prompt[0]


class Personalize(BaseModel):
    """The body of /v1/personalize: one input for many personas."""

    model_config = ConfigDict(extra="forbid")
    input: str
    users: list[str] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**31)


class SoftPrompt(BaseModel):
    """The body of /v1/personas/{id}/soft_prompt."""

    model_config = ConfigDict(extra="forbid")
    input: str
    rows: Literal["soft", "all"] = "soft"
    format: Literal["safetensors", "vllm"] = "safetensors"


class Items(BaseModel):
    """The body of POST /v1/personas/{id}/items."""

    model_config = ConfigDict(extra="forbid")
    items: list[dict[str, Any]] = Field(max_length=1000)
