"""The blocks of the DeepSpeed config: what they accept, and what they say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_lvxattn.config import SequenceParallelConfig, load_ds_config, sequence_parallel_config
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.plan.modes import strategies
from ds_lvxattn.training.settings import FinetuningConfig, finetuning_config

CONFIGS = Path(__file__).parent.parent / "ds_configs"
STRATEGIES = strategies()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_the_configs_that_come_along_are_valid(file: Path) -> None:
    config = load_ds_config(file)
    size = config["sequence_parallel_size"]
    assert size > 1 and sequence_parallel_config(config, 2 * size).size == size
    finetuning_config(config)


def test_without_the_block_training_is_plain_deepspeed() -> None:
    assert sequence_parallel_config({}, 3) == SequenceParallelConfig(size=1)
    assert sequence_parallel_config({"sequence_parallel_size": 2}, 4).strategy == "auto"
    assert finetuning_config({}) == FinetuningConfig()


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"strategie": "ring"}, ("'sequence_parallel.strategie'", "'ring'", "strategy", "layers", "placement")),
        ({"strategy": "megatron"}, ("'sequence_parallel.strategy'", "'megatron'", "auto", *STRATEGIES)),
        ({"strategy": None}, ("'sequence_parallel.strategy'", "None", "auto", *STRATEGIES)),
        ({"layers": {"*.cross_attn": "fast"}}, ("layers.*.cross_attn'", "'fast'", *STRATEGIES)),
        ({"layers": ["ring"]}, ("'sequence_parallel.layers'", "['ring']", "dict")),
        ({"schedule": "tree"}, ("'sequence_parallel.schedule'", "'tree'", "auto", "gather", "ring")),
        ({"kernel": "xla"}, ("'sequence_parallel.kernel'", "'xla'", "auto", "fa4", "triton", "math")),
        ({"kernel": "cudnn"}, ("'sequence_parallel.kernel'", "'cudnn'", "auto", "fa4", "triton", "math")),
        ({"recompute": True}, ("'sequence_parallel.recompute'", "True", "none", "kv", "layer")),
        ({"placement": "random"}, ("'sequence_parallel.placement'", "'random'", "contiguous", "striped")),
        ({"size": 2}, ("'sequence_parallel.size'", "'sequence_parallel_size'")),
        ("ring", ("'sequence_parallel'", "'ring'", "strategy")),
        ({"strategy": "a", "kernel": "b"}, ("'sequence_parallel.strategy'", "'sequence_parallel.kernel'")),
    ],
    ids=str,
)
def test_errors_name_key_value_and_what_is_accepted(block: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        sequence_parallel_config({"sequence_parallel_size": 2, "sequence_parallel": block}, 2)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("size", [0, -2, "2", 2.0, True, None])
def test_the_size_is_a_whole_number(size: Any) -> None:
    with pytest.raises(ConfigError, match=f"'sequence_parallel_size' is {size!r}; give a whole number"):
        sequence_parallel_config({"sequence_parallel_size": size}, 4)


def test_the_size_divides_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"is 4, which does not divide the 6 ranks.*\[1, 2, 3, 6\]"):
        sequence_parallel_config({"sequence_parallel_size": 4}, 6)


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"step": 3}, ("'finetuning.step'", "3", "steps", "on_bad_sample")),
        ({"steps": 0}, ("'finetuning.steps'", "0", "greater than or equal to 1")),
        ({"on_bad_sample": "ignore"}, ("'finetuning.on_bad_sample'", "'ignore'", "'skip' or 'fail'")),
        (
            {"trainable": "*.gate"},
            ("'finetuning.trainable' is '*.gate'", "'default' or 'all'; Input should be a valid list"),
        ),
        ({"trainable": []}, ("'finetuning.trainable' is []", "at least 1 item")),
        (7, ("'finetuning' is 7", "object")),
    ],
    ids=str,
)
def test_errors_of_the_finetuning_block(block: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        finetuning_config({"finetuning": block})
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{1}", "not valid JSON"), ("[1]", "holds a list")]
)
def test_unreadable_files(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"--ds_config .*ds.json: {message}"):
        load_ds_config(file)


def test_yaml_says_what_json_says(tmp_path: Path) -> None:
    text = """
    optimizer: &common
      params: {lr: 1e-5, betas: [0.9, 0.95]}
    other:
      <<: *common
      params: null
    sequence_parallel: {strategy: ring, layers: {"*.3.*": ulysses}}
    """
    (tmp_path / "ds.yaml").write_text(text)
    config = load_ds_config(tmp_path / "ds.yaml")
    assert config == {
        "optimizer": {"params": {"lr": 1e-5, "betas": [0.9, 0.95]}}, "other": {"params": None},
        "sequence_parallel": {"strategy": "ring", "layers": {"*.3.*": "ulysses"}},
    }  # fmt: skip
    for content, message in (("a: 1\na: 2", "'a' stands twice"), ("a: [", "not valid YAML"), ("- a", "holds a list")):
        (tmp_path / "bad.yml").write_text(content)
        with pytest.raises(ConfigError, match=f"bad.yml: {message}"):
            load_ds_config(tmp_path / "bad.yml")


def test_settings_over_a_config(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"sequence_parallel": {"strategy": "auto"}, "steps": 3}')
    words = [
        "sequence_parallel.strategy=ring",
        "bf16.enabled=true",
        "optimizer.params.lr=1e-5",
        'a={"b": [1]}',
        "x=a=b",
    ]
    assert load_ds_config(file, words) == {
        "sequence_parallel": {"strategy": "ring"}, "steps": 3, "bf16": {"enabled": True},
        "optimizer": {"params": {"lr": 1e-5}}, "a": {"b": [1]}, "x": "a=b",
    }  # fmt: skip
    for word, message in (("steps", "give key=value"), (".a=1", "give key=value"), ("steps.more=1", "'steps' is 3")):
        with pytest.raises(ConfigError, match=message):
            load_ds_config(file, [word])


@pytest.mark.parametrize(
    ("block", "named", "recompute", "offload"),
    [
        (None, {}, "kv", False),
        ({}, {}, "layer", False),
        ({"cpu_checkpointing": True, "partition_activations": False, "number_checkpoints": None}, {}, "layer", True),
        ({"cpu_checkpointing": True}, {"recompute": "kv"}, "kv", True),
        ({}, {"recompute": "none"}, "none", False),
    ],
)
def test_the_checkpointing_block_of_deepspeed(block: dict | None, named: dict, recompute: str, offload: bool) -> None:
    config = {"sequence_parallel": named} | ({} if block is None else {"activation_checkpointing": block})
    got = sequence_parallel_config(config, 2)
    assert (got.recompute, got.offload) == (recompute, offload)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"partition_activations": True}, {}), ({"number_checkpoints": 4}, {}), ({"profile": True}, {}),
        ({"cpu": True}, {}), ({"cpu_checkpointing": 1}, {}), ({"cpu_checkpointing": True}, {"recompute": "none"}),
        ("yes", {}),
    ],
)  # fmt: skip
def test_what_the_checkpointing_block_cannot_ask_for(block: Any, named: dict) -> None:
    with pytest.raises(ConfigError) as error:
        sequence_parallel_config({"activation_checkpointing": block, "sequence_parallel": named}, 2)
    assert "activation_checkpointing" in str(error.value)
