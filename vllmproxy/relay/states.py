"""Where an exchange can be, and what can happen to it. What then follows stands in the table of ``exchange.py``."""

from enum import Enum


class State(Enum):
    """Where an exchange is."""

    __hash__ = object.__hash__  # they are looked up all the time, and Enum's own is a Python function

    ADMITTING = "the key is being looked up, or its limits"
    HOLDING = "the body is being read, as the key's rules need it"
    QUEUED = "it stands in the line for a place"
    WAITING = "vLLM has the request, or is getting it"
    ANSWERING = "the answer passes"
    TUNNELLING = "bytes pass both ways"
    OVER = "settled"


class Event(Enum):
    """What can happen to an exchange from outside."""

    __hash__ = object.__hash__  # as above

    ADMITTED = "the caller is known"
    PIECE = "a piece of the body is here"
    HELD = "the body is here"
    PLACED = "there is a place for it"
    RESERVED = "the key's limits have room for this"
    REFUSED = "the proxy answers itself"
    ANSWERED = "the head of vLLM's answer is here"
    NO_ANSWER = "there will be none"
    BODY_ENDED = "the answer is whole"
    BODY_FAILED = "the answer broke off"
    UPLOAD_FAILED = "the request's body broke its framing, or stopped coming"
    CLIENT_GONE = "the client left"
    LATE = "what it waits for did not come in time"
    EXPIRED = "all of it took too long"
    REVOKED = "the key was blocked or deleted, and what runs is to end"
