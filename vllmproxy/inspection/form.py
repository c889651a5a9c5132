"""The text fields of a ``multipart/form-data`` body, read by the parser that Starlette and so vLLM reads them with.

What another reader, or another version of that parser, could take differently is refused: a delimiter that is not
alone on its line, bytes before the first or after the last part, a charset, a part with two names.
"""

import codecs
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from attrs import frozen
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vllmproxy.inspection.document import TooMuch, Unreadable

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

#: Of a field or of a part's headers, more is not read: Starlette refuses a longer field.
LONGEST_FIELD: Final = 1 << 20
#: Parts of a form, of which Starlette takes no more either, and bytes of a Content-Type.
MOST_PARTS: Final = 1000
_LONGEST_TYPE: Final = 1024

_NAMES: Final = frozenset({"model", "stream", "stream_include_usage", "max_completion_tokens", "user"})
_BROKEN: Final = "the form cannot be read in one way only"
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=?-]{1,70}")
_PARAMETER: Final = rb';[ \t]*([A-Za-z]+\*?)=(?:"(?:[^"\\\r\n]|\\.)*"|[^\s";\\]+)[ \t]*'
_DISPOSITION: Final = re.compile(rb"form-data[ \t]*(?:" + _PARAMETER + rb")*;?")
_PARAMETERS: Final = re.compile(_PARAMETER)


@frozen(kw_only=True)
class Field:
    """A text field: its value, and where its bytes begin and end in the body."""

    value: str
    start: int
    end: int


@frozen(kw_only=True)
class Form:
    """What matters of a form.

    :ivar fields: by name, of fields with one name the last.
    :ivar repeated: names given more than once, as text or as a file; ``files``: names given as a file.
    """

    fields: Mapping[str, Field]
    repeated: frozenset[str]
    files: frozenset[str]

    def value(self, name: str) -> str | None:
        """Return the text of the field ``name``, ``None`` if there is none."""
        field = self.fields.get(name)
        return None if field is None else field.value


def is_form(content_type: bytes | None) -> bool:
    """Tell whether the body is a form to Starlette; to it, all others are none.

    :raises TooMuch: it takes too long to say.
    """
    if content_type is None or content_type == b"application/json":  # nearly all
        return False
    if len(content_type) > _LONGEST_TYPE:
        raise TooMuch("its Content-Type is too long")
    return parse_options_header(content_type)[0].lower() == b"multipart/form-data"


def read_form(body: bytes, content_type: bytes) -> Form:
    """Read the form ``body``; files are passed over where they are.

    :raises Unreadable: it is none, or could be read in two ways.
    """
    boundary = _boundary_of(content_type)
    if body.count(b"\r\n--" + boundary) > MOST_PARTS:
        raise TooMuch("the form has too many parts")
    if not _is_framed(body, boundary):
        raise Unreadable(_BROKEN)
    reading = _Reading()
    try:
        parser = MultipartParser(boundary, reading.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Unreadable(_BROKEN) from None
    return reading.form()


def _boundary_of(content_type: bytes) -> bytes:
    options = parse_options_header(content_type)[1]
    boundary = options.get(b"boundary", b"")
    if b"*" in content_type or content_type.lower().count(b"boundary") != 1 or not _BOUNDARY.fullmatch(boundary):
        raise Unreadable("the form has no clear boundary")
    try:
        charset = codecs.lookup(options.get(b"charset", b"utf-8").decode("latin-1")).name
    except (LookupError, ValueError):
        charset = ""
    if charset != "utf-8" or content_type.lower().count(b"charset") > 1:
        raise Unreadable("the body is not UTF-8")
    return boundary


def _is_framed(body: bytes, boundary: bytes) -> bool:
    """Tell whether every delimiter is alone on its line, and nothing stands before the first or after the last."""
    mark = b"\r\n--" + boundary
    if not body.startswith(mark[2:] + b"\r\n"):
        return False
    at = len(mark) - 2
    while not body.startswith(b"--", at):
        if not body.startswith(b"\r\n", at):
            return False
        found = body.find(mark, at)
        if found < 0:
            return False
        at = found + len(mark)
    return body[at:] in (b"--", b"--\r\n")


class _Reading:
    """Takes the parser's callbacks, as ``starlette.formparsers.MultiPartParser`` does, and keeps the fields."""

    def __init__(self) -> None:
        self._fields: dict[str, Field] = {}
        self._repeated: set[str] = set()
        self._files: set[str] = set()
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition: bytes | None = None
        self._name: str | None = None  # of the field being read, if it is one to keep
        self._span: tuple[int, int] | None = None
        self._data = bytearray()

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._on_header,
            "on_header_value": self._on_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
        }

    def form(self) -> Form:
        return Form(fields=self._fields, repeated=frozenset(self._repeated), files=frozenset(self._files))

    def _part_begin(self) -> None:
        self._disposition = None
        self._name = None
        self._span = None
        self._data.clear()

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            if self._disposition is not None:
                raise Unreadable(_BROKEN)
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        name, is_file = _named(self._disposition or b"")
        if name not in _NAMES:
            return
        if name in self._fields or name in self._files:
            self._repeated.add(name)
        if is_file:
            self._files.add(name)
        else:
            self._name = name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            return
        if len(self._data) + end - start > LONGEST_FIELD:
            raise Unreadable(f"the field {self._name} is too long")
        self._span = (start if self._span is None else self._span[0], end)
        self._data += data[start:end]

    def _part_end(self) -> None:
        if self._name is None:
            return
        start, end = self._span or (0, 0)
        try:
            value = self._data.decode("utf-8")
        except UnicodeDecodeError:
            raise Unreadable("the body is not UTF-8") from None
        self._fields[self._name] = Field(value=value, start=start, end=end)


def _named(disposition: bytes) -> tuple[str, bool]:
    """Return a part's name, and whether it is a file.

    :raises Unreadable: it has no name, or two.
    """
    parameters = [name.lower() for name in _PARAMETERS.findall(disposition)]
    options = parse_options_header(disposition)[1]
    plain = _DISPOSITION.fullmatch(disposition) and parameters.count(b"name") == 1 and b"name*" not in parameters
    if not plain or b"name" not in options:
        raise Unreadable(_BROKEN)
    try:
        return options[b"name"].decode("utf-8"), any(name.startswith(b"filename") for name in parameters)
    except UnicodeDecodeError:
        raise Unreadable("the body is not UTF-8") from None
