"""What is asked and answered over HTTP, as OpenAI's clients write and read it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

#: Stop strings in one request, and characters in each: every new text is searched for all of them.
MOST_STOPS, LONGEST_STOP = 16, 1000
#: Answers in one request.
MOST_CHOICES = 16


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sound(text: str) -> str:
    """JSON can hold halves of surrogate pairs, of which no text can be made.

    Raises:
        ValueError: this one does.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return text


Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=MOST_CHOICES), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_whole)]
Token = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
String = Annotated[str, AfterValidator(_sound)]
Stop = Annotated[String, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Text = Annotated[String, StringConstraints(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    """Of a stream; of no consequence without one."""

    include_usage: bool = False
    """One more chunk at the end, with the numbers of tokens."""


class Asked(_Request):
    """What both routes take. What would change an answer in OpenAI's interface, and is not here, is refused."""

    model: Annotated[String, StringConstraints(min_length=1, max_length=1000)]
    """`auto` (the router chooses), an expert's name, or `base`."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0, which is the default here, is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    n: Count | None = None
    """Answers to each prompt."""
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None

    # of no consequence here, and sent by some clients
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # at the only value that is right here
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Most new tokens; None when it was not said."""
        return self.max_tokens

    @property
    def usage(self) -> bool:
        """Whether the stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(_Request):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: String


class Message(_Request):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: String | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None
    """Of no consequence here."""

    @property
    def plain(self) -> dict[str, str]:
        """As templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def question(self) -> str:
        """What the user said last: it is what a router reads."""
        said = [message.plain["content"] for message in self.messages if message.role == "user"]
        return said[-1] if said else self.messages[-1].plain["content"]


class TextAsked(Asked):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    """One or several, as text or as tokens."""
    echo: Literal[False] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else list(given)


# -- answers -------------------------------------------------------------------------------------------------


class Retained(BaseModel):
    """Who answered, how sure that is (0..1), and why, in words."""

    expert: str
    confidence: float
    why: str


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Reason = Literal["stop", "length"]


class Said(BaseModel):
    """An answer's message."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Said
    finish_reason: Reason
    logprobs: None = None


class TextChoice(BaseModel):
    """One answer; prompts in one request may be answered by different experts."""

    index: int
    text: str
    finish_reason: Reason
    logprobs: None = None
    retain: Retained


class _Whole(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage
    retain: Retained


class ChatAnswer(_Whole):
    """A chat's answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextAnswer(_Whole):
    """The continuations of prompts."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """One that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["retain"] = "retain"
    parent: str | None = None
    description: str = ""


class ModelList(BaseModel):
    """All that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
