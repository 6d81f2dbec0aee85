"""Config files: the ones that we ship are complete, and a wrong one is refused with a message that helps."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster.config import ClusterConfig, key_paths, load_config
from engine.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def faults(path: Path, overrides: dict[str, object] | None = None) -> list[str]:
    """The lines of the refusal, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or {})
    lines = caught.value.message.split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def keys_of(values: object, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return set()
    return {prefix + key for key in values} | {
        path for key in values for path in keys_of(values[key], f"{prefix}{key}.")
    }


# --- files that we ship ---------------------------------------------------------------------------------------


def test_the_configs_of_the_readme_are_there() -> None:
    assert {path.name for path in FILES} >= {"local.yaml", "1p1d-gpu.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_config_loads_and_names_every_key(path: Path) -> None:
    load_config(path)
    assert set(key_paths(ClusterConfig)) - keys_of(yaml.safe_load(path.read_text())) == set()


def test_the_local_config_says_what_the_defaults_are() -> None:
    assert load_config(CONFIGS / "local.yaml") == ClusterConfig()


# --- what is accepted -----------------------------------------------------------------------------------------


def test_an_empty_file_takes_all_defaults(write) -> None:
    assert load_config(write("# nothing yet\n")) == ClusterConfig()


def test_a_whole_number_will_do_where_a_fraction_is_possible(write) -> None:
    assert load_config(write("router: {deadline_s: 5}")).router.deadline_s == 5.0


def test_overrides_win_over_the_file_and_fill_what_it_leaves_out(write) -> None:
    config = load_config(write("router: {port: 1}"), {"router.port": 8123, "pools.decode.workers": 3})
    assert (config.router.port, config.pools.decode.workers, config.pools.prefill.workers) == (8123, 3, 1)


def test_two_sections_may_share_their_keys(write) -> None:
    config = load_config(write("pools: {prefill: &pool {workers: 2}, decode: {<<: *pool, num_cpus: 0.5}}"))
    assert (config.pools.decode.workers, config.pools.decode.num_cpus) == (2, 0.5)


def test_a_loaded_config_cannot_be_altered() -> None:
    config = load_config(CONFIGS / "local.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        config.router.port = 1


# --- what is refused ------------------------------------------------------------------------------------------

FAULTS = {
    # waits and bounds of the HTTP side
    "router: {read_timeout_s: 0}": "router.read_timeout_s: must be more than 0, got 0",
    "router: {write_timeout_s: soon}": "router.write_timeout_s: expected a number, got 'soon'",
    "router: {drain_s: -1}": "router.drain_s: must be at least 0, got -1",
    "router: {max_connections: 0}": "router.max_connections: must be at least 1, got 0",
    # unknown keys
    "router: {prot: 1}": "router.prot: unknown key; did you mean 'port'?",
    "rooter: {port: 1}": "rooter: unknown key; did you mean 'router'?",
    "pools: {prefill: {worker: 1}}": "pools.prefill.worker: unknown key; did you mean 'workers'?",
    "port: 1": "port: unknown key; did you mean 'router.port'?",
    "engine: {max_pulls: 2}": "engine.max_pulls: unknown key; did you mean 'decode.max_pulls'?",
    "engine: {workers: 2}": (
        "engine.workers: unknown key; did you mean 'pools.prefill.workers' or 'pools.decode.workers'?"
    ),
    "model: {zzz: 1}": "model.zzz: unknown key",
    "on: 1": "top level: a key must be text, got true; put it in quotes",
    "engine: {1: 2}": "engine: a key must be text, got 1; put it in quotes",
    # wrong types
    "router: {port: '8000'}": "router.port: expected a whole number, got '8000'",
    "router: {port: 1.5}": "router.port: expected a whole number, got 1.5",
    "router: {port: true}": "router.port: expected a whole number, got true",
    "router: {port: }": "router.port: expected a whole number, got nothing",
    "router: {host: 3}": "router.host: expected text, got 3",
    "router: {deadline_s: 1e3}": "router.deadline_s: expected a number, got '1e3'",
    "engine: {prefix_cache: 1}": "engine.prefix_cache: expected true or false, got 1",
    "engine: [1]": "engine: expected keys with values, got a list",
    "engine:": "engine: expected keys with values, got nothing",
    "model: {name: {a: 1}}": "model.name: expected text, got a mapping",
    "pools: {decode: {resources: {disk: x}}}": "pools.decode.resources.disk: expected a number, got 'x'",
    # values out of range
    "router: {port: 65536}": "router.port: must be at most 65535, got 65536",
    "router: {deadline_s: 0}": "router.deadline_s: must be more than 0, got 0",
    "pools: {prefill: {workers: 0}}": "pools.prefill.workers: must be at least 1, got 0",
    "prefill: {outbox_fraction: 1.5}": "prefill.outbox_fraction: must be at most 1, got 1.5",
    "prefill: {outbox_fraction: 0}": "prefill.outbox_fraction: must be more than 0, got 0",
    "kv_transfer: {frame_bytes: 4194304}": "kv_transfer.frame_bytes: must be at most 3145728, got 4194304",
    "kv_transfer: {frame_bytes: 100}": "kv_transfer.frame_bytes: must be at least 4096, got 100",
    "model: {name: ''}": "model.name: must not be empty",
    "model: {dtype: float16}": "model.dtype: expected 'float32' or 'bfloat16', got 'float16'",
    "kv_transfer: {carrier: pigeon}": (
        "kv_transfer.carrier: expected 'auto', 'all', 'grpc', 'shm' or 'dist', got 'pigeon'"
    ),
    # impossible combinations
    "rpc: {tls: {ca_file: ca.pem, cert_file: node.pem}}": (
        "rpc.tls: give all of ca_file, cert_file and key_file, or none; missing: key_file"
    ),
    "rpc: {tls: {key_file: node.key}}": (
        "rpc.tls: give all of ca_file, cert_file and key_file, or none; missing: ca_file, cert_file"
    ),
    "{kv_transfer: {carrier: all}, rpc: {tls: {ca_file: a, cert_file: b, key_file: c}}}": (
        "kv_transfer.carrier: all would send KV in plain text beside rpc.tls; use auto, grpc or shm"
    ),
    "kv_transfer: {heartbeat_s: 5}": (
        "kv_transfer: heartbeat_s (5) must be less than half of lease_ttl_s (10), or one lost heartbeat ends the lease"
    ),
    "engine: {prefill_chunk: 1024}": "engine: prefill_chunk (1024) must not exceed max_batch_tokens (512)",
    "engine: {device: cuda}": (
        "engine: runner 'process' shares KV by memory, which a cuda pool cannot; use runner: thread"
    ),
    "engine: {device: cuda, runner: thread, pool: mapped}": (
        "engine: a cuda pool cannot be mapped by others; use pool: ring"
    ),
    "engine: {pool: ring}": "engine: a pool behind a ring belongs to a thread of the worker; use runner: thread",
    "kv_transfer: {ring_bytes: 4096}": "kv_transfer: ring_bytes (4096) must be at least twice frame_bytes (1048576)",
    "model: {max_context: 40000}": (
        "model.max_context: 40000 tokens do not fit in engine.num_blocks x engine.block_size = 32768; "
        "use num_blocks: 2500 or more"
    ),
    "pools: {prefill: {tensor_parallel: 65}}": "pools.prefill.tensor_parallel: must be at most 64, got 65",
    "{engine: {runner: thread}, pools: {prefill: {tensor_parallel: 2}}}": (
        "pools.prefill.tensor_parallel: 2 ranks need engine.runner: process, which there is for engine.device: cpu only"
    ),
    "pools: {decode: {num_gpus: 1}}": (
        "pools.decode.num_gpus: engine.device is cpu, so 1 would be taken and never used"
    ),
    # what is not a config at all
    "- 1": "expected sections with keys, got a list",
    "just text": "expected sections with keys, got 'just text'",
    "router:\n  port: 1\n  host: [a": "line 3: expected ',' or ']', but got '<stream end>'",
    "router:\n\tport: 1": "line 2: found character '\\t' that cannot start any token",
    "router:\n  port: 1\n  port: 2": "line 3: the key 'port' is given twice",
    "router:\n  deadline_s: .inf": "line 2: .inf is not a finite number",
    "router:\n  deadline_s: .nan": "line 2: .nan is not a finite number",
    "model: {name: 2024-02-31}": "is not YAML: day is out of range for month",
    "model: !!python/name:os.system": (
        "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"
    ),
    "? [a]\n: 1": "line 1: found unhashable key",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_refused_with_its_path_and_what_to_do(text: str, write) -> None:
    assert faults(write(text)) == [FAULTS[text]]


def test_all_faults_are_told_at_once(write) -> None:
    path = write(
        """
        router: {prot: 1, host: 2}
        engine: {num_blocks: many}
        """
    )
    assert faults(path) == [
        "engine.num_blocks: expected a whole number, got 'many'",
        "router.host: expected text, got 2",
        "router.prot: unknown key; did you mean 'port'?",
    ]


def test_every_pool_that_lacks_a_gpu_is_named(write) -> None:
    path = write("engine: {device: cuda, runner: thread}")
    assert faults(path) == [
        "pools.prefill.num_gpus: engine.device is cuda, so every rank needs at least 1, got 0",
        "pools.decode.num_gpus: engine.device is cuda, so every rank needs at least 1, got 0",
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe\x01", b"a: \x00", b"[" * 5000, b"&a {a: *a}"])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert len(faults(path)) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert faults(tmp_path / "none.yaml") == ["cannot be read: No such file or directory"]
    assert faults(tmp_path) == ["cannot be read: Is a directory"]


def test_a_wrong_override_is_refused_like_a_wrong_file(write) -> None:
    path = write("router: {port: 1}")
    assert faults(path, {"router.port": 99999}) == ["router.port: must be at most 65535, got 99999"]
    assert faults(path, {"router.prot": 1}) == ["router.prot: unknown key; did you mean 'port'?"]
    with pytest.raises(ConfigError, match=r"router\.port\.x: cannot be set, because port is not a section but 1"):
        load_config(path, {"router.port.x": 1})
