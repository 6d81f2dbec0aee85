"""Which native code the tests are of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from kernels.cpu.native.library import has_avx512, load_library
from tests.kernels import native


@pytest.fixture(scope="module", params=["native", "x86-64-v3"] if has_avx512() else ["native"])
def each_vectors(request: pytest.FixtureRequest) -> Iterator[None]:
    """That of this processor; where it has AVX-512, that for AVX2 as well."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "load_library", partial(load_library, request.param))
        yield
