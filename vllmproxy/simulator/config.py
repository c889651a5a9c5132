"""What can be set on a simulated vLLM."""

from attrs import field, frozen

#: The model that the examples of the pass-through page call.
DEFAULT_MODEL = "qwen2.5-7b-instruct"


@frozen(kw_only=True)
class SimulatorConfig:
    """The settings of one simulated server. Times are seconds.

    :ivar model: the one model it serves.
    :ivar ttft: time to the first token of an answer.
    :ivar tpot: time between one token and the next.
    :ivar keep_alive: how long a connection stays open after an answer, as ``uvicorn``'s 5 s.
    :ivar api_key: if set, asked for as ``Authorization: Bearer`` on the routes that vLLM guards.
    :ivar answer_tokens: how many tokens an answer has before it stops by itself; ``None``: as many as the
        request allows, 16 where it names no limit.
    :ivar comment_every: a ``: keep-alive`` comment whenever a stream has been idle that long; 0 for never.
    :ivar allowed_origins: the origins that CORS lets in, or ``("*",)``; vLLM 0.32 lets none in by default.
    """

    model: str = DEFAULT_MODEL
    ttft: float = 0.0
    tpot: float = 0.0
    keep_alive: float = 5.0
    api_key: str | None = field(default=None, repr=False)
    answer_tokens: int | None = None
    comment_every: float = 0.0
    allowed_origins: tuple[str, ...] = ()
