"""A port that several gateways share, and one that nobody shares."""

from __future__ import annotations

from contextlib import closing

import pytest

from cluster.listener import bind, listen, require_free
from engine.errors import ConfigError


def test_those_who_share_a_port_have_it_together_and_nobody_else_has_it() -> None:
    with closing(bind("127.0.0.1", 0, is_shared=True)) as first:
        port = first.getsockname()[1]
        with closing(bind("127.0.0.1", port, is_shared=True)) as second:
            assert second.getsockname() == first.getsockname()
        first.listen()
        with pytest.raises(ConfigError, match="is in use"):
            listen("127.0.0.1", port)
        with pytest.raises(ConfigError, match="is in use"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)


def test_a_port_that_is_not_shared_cannot_be_joined() -> None:
    with closing(listen("127.0.0.1", 0)) as only, pytest.raises(ConfigError, match="is in use"):
        bind("127.0.0.1", only.getsockname()[1], is_shared=True)
