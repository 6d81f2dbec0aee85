"""Finds the calls in a text that comes in pieces.

1. Text before a mark is content. White space is held back until what follows it is known.
2. After the mark, an object is held back until its function's name is known and its arguments begin.
3. From there on the arguments go out as they come, to the bracket that closes them.
4. What is held back and turns out to be no call, for its form or for a function that nobody offered, is content.

It decides by one character after another, so the same parts come out however the text was cut. Nothing is lost but
marks around calls and white space beside them. Once its arguments have begun, a call is one, whatever follows: what the
model wrote as arguments is what the client gets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from router.parts import CallArguments, CallStart, Content, Part, joined
from router.tools.call_json import call_in, name_in
from router.tools.formats import SEPARATORS, Marks
from router.tools.nesting import Nesting

MAX_HELD_SPACE = 64  # white space before a mark; of more, the rest is content in any case
MAX_NAME = 256  # of a function, with the separators after it, outside of JSON


class CallParser:
    """`names`: the functions on offer. With `is_single` calls after the first are dropped."""

    def __init__(self, marks: Marks, names: Collection[str], is_single: bool = False) -> None:
        self.num_calls = 0
        self._marks = marks
        self._names = names
        self._is_single = is_single
        self._out: list[Part] = []
        self._state: Callable[[str], None] = self._at_start if marks.bare else self._in_text
        self._held = ""  # of a mark or white space, as it was written
        self._object: list[str] = []  # what follows it: the characters of an object, or of a name
        self._end = ""  # of what is being read, as long as a closer
        self._nesting = Nesting()
        self._floor = 0  # the depth at which the arguments end
        self._is_first = True  # no object has begun in this one
        self._in_list = False
        self._has_call = False  # since the last opener

    def push(self, text: str) -> tuple[Part, ...]:
        if self._state == self._in_text and self._marks.opener[:1] not in text and not self._held.strip():
            self._pass_on(self._held + text)
        else:
            for char in text:
                self._state(char)
        return self._taken()

    def flush(self) -> tuple[Part, ...]:
        """At the end, what was held back is what it looks like."""
        is_markup = self._has_call and self._state in (self._between, self._in_closer, self._in_tail)
        is_space = self._state == self._in_text and self.num_calls and self._held.isspace()
        if self._state == self._in_arguments:
            self._argue(self._held)
        elif not is_markup and not is_space:
            self._spill()
        self._held = ""
        return self._taken()

    def _taken(self) -> tuple[Part, ...]:
        parts, self._out = joined(self._out), []
        return parts

    # --- content -------------------------------------------------------------------------------------------

    def _at_start(self, char: str) -> None:
        """Of an answer that may be calls without a mark."""
        if char in "{[":
            self._open()
            self._between(char)
        elif char.isspace() and len(self._held) < MAX_HELD_SPACE:
            self._held += char
        else:
            self._in_text(char)

    def _in_text(self, char: str) -> None:
        self._state = self._in_text
        opener = self._marks.opener
        self._held += char
        mark = self._held.lstrip()
        if opener and mark == opener:
            self._open()
        elif not opener.startswith(mark) or len(self._held) - len(mark) > MAX_HELD_SPACE:
            held, self._held = self._held, ""
            doubtful = self._doubtful(held)
            self._say(held[: len(held) - len(doubtful)])
            self._held = doubtful

    def _pass_on(self, text: str) -> None:
        """The same for text in which no mark begins, at once."""
        num_spaces = min(len(text) - len(text.rstrip()), MAX_HELD_SPACE)
        self._held = text[len(text) - num_spaces :]
        self._say(text[: len(text) - num_spaces])

    def _doubtful(self, held: str) -> str:
        """The longest end of the text, but not all of it, that may be white space and the beginning of the mark."""
        opener = self._marks.opener
        starts = range(max(1, len(held) - MAX_HELD_SPACE - len(opener)), len(held))
        ends = (held[start:] for start in starts)
        return next((end for end in ends if opener.startswith(end.lstrip())), "") if opener else ""

    def _open(self) -> None:
        self._has_call = self._in_list = False
        self._state = self._between

    def _spill(self) -> None:
        """It was no call."""
        self._say(self._held + "".join(self._object))
        self._held, self._object = "", []
        self._state = self._in_text

    # --- between calls -------------------------------------------------------------------------------------

    def _between(self, char: str) -> None:
        """After the mark, or after an object."""
        if char == "{":
            self._begin_object()
            self._in_object(char)
        elif char.isspace() or self._is_punctuation(char):
            self._held += char
        elif self._has_call and not self._in_list and self._marks.closer.startswith(char):
            self._held = ""
            self._state = self._in_closer
            self._in_closer(char)
        elif self._has_call:
            self._leave(char)
        elif self._marks.has_names and not self._in_list:
            self._state = self._in_name
            self._in_name(char)
        else:
            self._spill()
            self._in_text(char)

    def _is_punctuation(self, char: str) -> bool:
        if char == "[" and not self._has_call and not self._in_list:
            self._in_list = True
            return True
        if char == "]" and self._in_list:
            self._in_list = False
            return True
        return char in ",;" and self._has_call

    def _leave(self, char: str) -> None:
        """The calls of this mark are over."""
        self._held = ""
        self._in_text(char)

    def _in_closer(self, char: str) -> None:
        self._held += char
        if self._held == self._marks.closer:
            self._held = ""
            self._state = self._in_text
        elif not self._marks.closer.startswith(self._held):
            held, self._held = self._held, ""
            for one in held:
                self._in_text(one)

    # --- a call --------------------------------------------------------------------------------------------

    def _in_name(self, char: str) -> None:
        if char == "{" and self._start(_plain_name("".join(self._object))):
            self._begin_object(floor=0)
            self._state = self._in_arguments
            self._in_arguments(char)
            return
        self._object.append(char)
        if char in "{\n" or len(self._object) > MAX_NAME:
            self._spill()

    def _begin_object(self, floor: int = 1) -> None:
        self._nesting, self._floor, self._end = Nesting(), floor, ""
        self._state, self._is_first = self._in_object, True

    def _in_object(self, char: str) -> None:
        self._object.append(char)
        self._nesting.take(char)
        if char == "{" and self._nesting.depth == 2 and not self._nesting.in_string and self._is_first:
            self._is_first = False  # an object before this one is another key's
            if self._start(name_in("".join(self._object))):
                self._state = self._in_arguments
                self._argue(char)
        elif self._nesting.depth == 0:
            self._end_object()
        elif self._closes(char):
            self._spill()

    def _end_object(self) -> None:
        call = call_in("".join(self._object))
        if call is not None and self._start(call.name):
            self._argue(call.arguments)
            self._state = self._between
        else:
            self._spill()

    def _in_arguments(self, char: str) -> None:
        self._held += char  # the beginning of a closer, if any
        if self._marks.closer and self._held == self._marks.closer:
            self._held = ""
            self._state = self._in_text
        elif self._nesting.in_string or not self._may_close(self._held):
            held, self._held = self._held, ""
            for one in held:
                self._nesting.take(one)
            self._argue(held)
            if self._nesting.depth <= self._floor:
                self._state = self._in_tail if self._nesting.depth else self._between

    def _in_tail(self, char: str) -> None:
        """What follows the arguments in their object."""
        self._nesting.take(char)
        if self._nesting.depth == 0:
            self._state = self._between
        elif self._closes(char):
            self._state = self._in_text

    def _closes(self, char: str) -> bool:
        """Does this character complete a closer?"""
        closer = self._marks.closer
        self._end = (self._end + char)[-len(closer) :] if closer and not self._nesting.in_string else ""
        return bool(closer) and self._end == closer

    def _may_close(self, text: str) -> bool:
        return bool(self._marks.closer) and self._marks.closer.startswith(text)

    def _start(self, name: str | None) -> bool:
        """Begin a call of this function, if there is one of this name."""
        if name not in self._names:
            return False
        self._held, self._object, self._end, self._has_call = "", [], "", True
        if not self._is_silent:
            self._out.append(CallStart(self.num_calls, str(name)))
        self.num_calls += 1
        return True

    # --- what comes out ------------------------------------------------------------------------------------

    @property
    def _is_silent(self) -> bool:
        return self._is_single and self.num_calls > 0

    def _say(self, text: str) -> None:
        if text:
            self._out.append(Content(text))

    def _argue(self, text: str) -> None:
        if text and not (self._is_single and self.num_calls > 1):
            self._out.append(CallArguments(self.num_calls - 1, text))


def _plain_name(text: str) -> str:
    """The name without what stands between it and its arguments."""
    cuts = [at for word in SEPARATORS if (at := text.find(word)) >= 0]
    return text[: min(cuts, default=len(text))].strip()
