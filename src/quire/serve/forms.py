"""What requests may say, as types: an unknown field, a wrong type or a number out of range is refused by name.

Fields that other servers know and this one cannot honour are absent, so they are refused and never silently ignored.
`user`, `metadata`, `safety_identifier` and `prompt_cache_key` are labels: they are accepted and change nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CacheOptions",
    "ChatForm",
    "CompletionForm",
    "DetokenizeForm",
    "Form",
    "Labels",
    "Message",
    "ResponseFormat",
    "SamplingForm",
    "StreamOptions",
    "StructuredOutputs",
    "TextPart",
    "TokenizeForm",
    "Tool",
    "ToolCall",
    "ToolChoice",
]

Text = Annotated[str, Field(max_length=1 << 24)]
TokenIds = list[Annotated[int, Field(ge=0)]]


class Form(BaseModel):
    """A JSON object of exactly these fields, without conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CacheOptions(Form):
    """What a request may say about the cache. Extra field `cache`; `extra_body={"cache": …}` in OpenAI's client.

    Attributes:
        kv: the recipe that it relies on: the one that the server runs, or a refusal.
        keep: which of its tokens stay, as `"h2o:budget=0.2"`; default: what the server runs.
        context_tokens: how many tokens of the prompt are a context that others ask about as well: tokens go at its end,
            and what stays is found by later requests with the same context and `keep`, where that asks no question.
        yields: what it gives up when memory runs short, not before: older blocks, encoded, as `"kv=int4"`, or tokens,
            as `"keydiff:budget=0.5"`.
        share: "off": find nothing that others computed, and leave nothing.
        priority: each step is worth a doubling of its blocks' uses; the operator sets the highest.
        keep_for_s: seconds in which its blocks go only when no other block is idle; the operator sets the longest.
        salt: divides the tenant's own cache: only requests with the same salt find each other's blocks.
    """

    kv: str | None = None
    keep: str | None = None
    context_tokens: Annotated[int, Field(ge=1)] | None = None
    yields: str | None = None
    share: Literal["off", "prefix"] | None = None
    priority: Annotated[int, Field(ge=-3, le=3)] | None = None
    keep_for_s: Annotated[float, Field(ge=0)] | None = None
    salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class StructuredOutputs(Form):
    """One grammar for the output: a JSON schema, a regular expression, a list of texts, or a Lark grammar."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: Text | None = None


class Labels(Form):
    """Fields that name or sort a request; and those of which only the neutral value can be had."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class SamplingForm(Form):
    """What all dialects share about the choice of tokens; `SamplingParams` says what each means."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None


class OpenAISampling(SamplingForm, Labels):
    """The rest of OpenAI's, and what vLLM adds to it."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache: CacheOptions | None = None


class StreamOptions(Form):
    """Whether the last chunk tells the usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Form):
    """A part of a message. Only text: images, audio and files have no place in a model of text."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class FunctionCall(Form):
    """A function's name, and its arguments as JSON text."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(Form):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Form):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class JSONSchema(Form):
    """OpenAI's envelope of a schema. Every schema is followed to the letter, `strict` or not."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Form):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class FunctionTool(Form):
    """What a function is called, what it is for, and the schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Form):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Form):
    """Which function."""

    name: str


class ToolChoice(Form):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatForm(OpenAISampling):
    """POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionForm(OpenAISampling):
    """POST /v1/completions."""

    model: str
    prompt: (
        str
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1024)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=1024)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None


class TokenizeForm(Form):
    """POST /tokenize: a text, or messages through the chat template."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeForm(Form):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=1 << 22)]
