"""Config of the HTTP face's edges: which web pages may ask, and its certificate."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from engine.config import StrictModel


class CorsConfig(StrictModel):
    """Which web pages' scripts may read our answers. Keys are sent as headers, so cookies are never let through."""

    allow_origins: list[str] = Field(default=[], description="such as https://chat.example.org; '*': all; empty: off")
    allow_headers: list[str] = Field(
        default=["authorization", "content-type", "x-api-key"], description="that such a page may send"
    )


class FaceTls(StrictModel):
    """TLS of the HTTP API; without a certificate it is plain HTTP."""

    cert_file: str | None = Field(default=None, min_length=1, description="PEM, with its chain")
    key_file: str | None = Field(default=None, min_length=1, description="PEM, without a password")
    client_ca_file: str | None = Field(default=None, min_length=1, description="clients must show a certificate of it")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs cert_file and key_file")
        return self
