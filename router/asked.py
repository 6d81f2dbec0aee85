"""One prompt of a request, and what has become known of it while its answers are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.types import Request, TokenLogprob, TokenOutput
from router.logprobs import PromptLogprobs, ScoredToken, prompt_logprobs, score_prompt


@dataclass(slots=True)
class Asked:
    """`echo`: the text that its answers begin with. `num_top`: of the likely tokens beside each of the echoed ones;
    None if these are not wanted. `num_told`: the same of the extension `prompt_logprobs`."""

    request: Request
    echo: str = ""
    num_top: int | None = None
    num_told: int | None = None
    num_cached: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    is_known: bool = False  # its logprobs have come

    def take(self, output: TokenOutput) -> None:
        """The prompt's logprobs come with the first output of its first answer."""
        self.num_cached = max(self.num_cached, output.cached_tokens)
        self.logprobs += output.prompt_logprobs
        self.is_known = self.is_known or output.key.request_id == self.request.request_id

    @property
    def can_be_echoed(self) -> bool:
        return self.is_known or self.num_top is None

    def echoed(self, token_text: Callable[[int], str]) -> tuple[ScoredToken, ...]:
        if self.num_top is None:
            return ()
        return score_prompt(self.request.prompt_ids, self.logprobs, token_text, self.num_top)

    def told(self, token_text: Callable[[int], str]) -> PromptLogprobs | None:
        if self.num_told is None:
            return None
        return prompt_logprobs(self.request.prompt_ids, self.logprobs, token_text, self.num_told)
