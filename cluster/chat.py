"""A conversation in the terminal: it streams each answer and remembers what was said.

Ctrl-C ends an answer (what came of it stays in the history), Ctrl-D ends the conversation.
"""

from __future__ import annotations

from contextlib import closing

from rich.console import Console
from rich.text import Text

from cluster.client import ApiClient, ApiError, ChatOptions, Message, NotListening


class Conversation:
    def __init__(self, client: ApiClient, options: ChatOptions, console: Console, system: str | None = None) -> None:
        self._client = client
        self._options = options
        self._console = console
        self._history = [Message("system", system)] if system else []

    def ask(self, text: str) -> None:
        """Print the answer as it comes. Raises ApiError, with the question forgotten."""
        self._history.append(Message("user", text))
        pieces: list[str] = []
        try:
            with closing(self._client.stream_chat(self._history, self._options)) as answer:
                for piece in answer:
                    pieces.append(piece)
                    self._print(piece)
        except KeyboardInterrupt:
            self._print(" [interrupted]")
        except ApiError:
            self._history.pop()
            raise
        finally:
            self._print("\n")
        self._history.append(Message("assistant", "".join(pieces)))

    def run(self) -> None:
        """Ask what is typed until Ctrl-D. Raises NotListening when the server has gone."""
        self._console.print(f"{self._options.model}: Ctrl-C ends an answer, Ctrl-D leaves", style="dim", markup=False)
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                self._print("\n")
                return
            except KeyboardInterrupt:
                self._print("\n")
                continue
            if text:
                self._ask_and_go_on(text)

    def _ask_and_go_on(self, text: str) -> None:
        try:
            self.ask(text)
        except NotListening:
            raise
        except ApiError as error:
            self._console.print(Text(error.message, style="red"), soft_wrap=True)

    def _print(self, text: str) -> None:
        """At once, without markup or wrapping, and without what would steer the terminal."""
        self._console.file.write("".join(char for char in text if char.isprintable() or char in "\n\t"))
        self._console.file.flush()
