"""Every policy of the catalogue in a config: built from its dataclass, written back, and refused by its keys."""

from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml

import distclip
from distclip import (
    AutoClip,
    Chain,
    Cosine,
    MaxNorm,
    PerGroup,
    PerParameter,
    Shadow,
    SkipSpikes,
    ValueClip,
    Warmup,
    ZClip,
)
from distclip.train.parse import read_config, to_yaml
from distclip.train.policies import CATALOGUE, plain, policy_of
from distclip.train.problem import ConfigError
from support.ranks import run_ranks
from train.commands import CONFIGS, TINY, metrics, train_here

NEEDED = {"max_norm": 0.5, "norm": 2.0, "clip_value": 0.25}  # of fields that have no default
MEMBER = {"patterns": ["*.weight"], "policy": "zclip"}

SAID = [
    (2, MaxNorm(2.0)),
    ({"max_norm": 1.5}, MaxNorm(1.5)),
    ({"policy": "none"}, MaxNorm(inf)),
    ({"policy": "value", "clip_value": [-1, 2]}, ValueClip((-1.0, 2.0))),
    ({"policy": "zclip", "max_norm": None, "warmup_steps": 5}, ZClip(warmup_steps=5)),
    ({"policy": "skip_spikes", "on": ["norm", "loss"]}, SkipSpikes(on=("norm", "loss"))),
    (
        {"policy": "max_norm", "max_norm": {"warmup": {"start": 10, "end": 1, "steps": 7}}},
        MaxNorm(Warmup(10.0, 1.0, 7)),
    ),
    ({"max_norm": {"cosine": {"start": 3.0, "end": 1.0, "steps": 7}}}, MaxNorm(Cosine(3.0, 1.0, 7))),
    ({"chain": [{"policy": "skip_spikes"}, 1.0]}, Chain(SkipSpikes(), 1.0)),
    (
        {"per_parameter": {"chain": [{"policy": "autoclip", "window": 9}, 2]}},
        PerParameter(Chain(AutoClip(window=9), 2.0)),
    ),
    (
        {
            "per_group": {
                "w": MEMBER,
                "b": {"patterns": "*.bias", "policy": "none"},
                "n": {"patterns": "n", "max_norm": 2},
            }
        },
        PerGroup({"w": (("*.weight",), ZClip()), "b": ("*.bias", None), "n": ("n", 2.0)}),
    ),
    ({"shadow": {"acting": 1.0, "z": {"policy": "zclip"}}}, Shadow(1.0, z=ZClip())),
    (
        {"chain": [{"per_group": {"w": MEMBER}}, {"chain": [3.0]}]},
        Chain(PerGroup({"w": ("*.weight", ZClip())}), Chain(3.0)),
    ),
]


@pytest.mark.parametrize(("said", "policy"), SAID, ids=str)
def test_what_is_said_is_built_and_written_as_it_is_read(said, policy):
    assert policy_of(said, "clip") == policy
    assert policy_of(plain(policy), "clip") == policy
    assert yaml.safe_load(yaml.safe_dump(plain(policy))) == plain(policy)


def spelled_out(kind: type) -> dict[str, Any]:
    name = next(name for name, known in CATALOGUE.items() if known is kind)
    return {"policy": name, **{field.name: NEEDED[field.name] for field in fields(kind) if field.name in NEEDED}}


def test_all_policies_of_the_package_are_in_the_catalogue():
    found = {
        kind for kind in vars(distclip).values() if isinstance(kind, type) and callable(getattr(kind, "decide", None))
    }
    wrappers = {Chain, PerParameter, PerGroup, Shadow, distclip.Policy}
    assert {*CATALOGUE.values()} == found - wrappers
    assert {"max_norm", "value", "autoclip", "zclip", "skip_spikes", "quantile_tracker"} <= {*CATALOGUE}


@pytest.mark.parametrize("kind", CATALOGUE.values())
def test_each_is_built_by_its_defaults_and_written_back(kind):
    policy = policy_of(spelled_out(kind), "clip")
    assert type(policy) is kind
    assert policy_of(plain(policy), "clip") == policy


WRONG = [
    ("zclip", "clip", "must be a number or a policy: {policy: zclip}, not 'zclip'"),
    (True, "clip", "must be a number or a policy"),
    ([1.0], "clip", "must be a number or a policy"),
    ({"policy": "zclipp"}, "clip.policy", "must be one of "),
    ({"policy": ["zclip"]}, "clip.policy", "must be one of "),
    ({"policy": 3}, "clip.policy", "must be one of "),
    ({}, "clip.max_norm", "clip.policy=max_norm needs it: add clip.max_norm=1.0"),
    ({"policy": "zclip", "window": 3}, "clip.window", "there is no such key; known are alpha, z_thresh"),
    (
        {"policy": "zclip", "warmup_step": 3},
        "clip.warmup_step",
        "there is no such key; did you mean clip.warmup_steps?",
    ),
    ({"policy": "zclip", "warmup_steps": 2.5}, "clip.warmup_steps", "must be int, not 2.5"),
    ({"policy": "zclip", "warmup_steps": True}, "clip.warmup_steps", "must be int, not True"),
    ({"policy": "zclip", "alpha": "0.9"}, "clip.alpha", "must be float, not '0.9'"),
    ({"policy": "zclip", "alpha": 2}, "clip.alpha", "must "),
    ({"policy": "autoclip", "percentile": 101}, "clip.percentile", "must be from 0 to 100, got 101.0"),
    ({"policy": "autoclip", "window": 0}, "clip.window", "must be a whole number of at least 1"),
    ({"policy": "autoclip", "window": 10**7}, "clip.window", "must be at most 1e6"),
    ({"policy": "value"}, "clip.clip_value", "clip.policy=value needs it"),
    ({"policy": "value", "clip_value": [1]}, "clip.clip_value", "must be a number or (min, max)"),
    ({"policy": "value", "clip_value": ["a"]}, "clip.clip_value", "must be float, not 'a'"),
    ({"policy": "skip_spikes", "on": "norm"}, "clip.on", "must be a list of str, not 'norm'"),
    ({"policy": "none", "max_norm": 1}, "clip.max_norm", "clip.policy=none has no fields"),
    (
        {"max_norm": {"ramp": {}}},
        "clip.max_norm",
        "must be a schedule: {warmup: {start: 10.0, end: 1.0,",
    ),
    ({"max_norm": {"warmup": {"start": 1.0}}}, "clip.max_norm.warmup.end", "needs it"),
    ({"max_norm": {"warmup": {"start": 1, "end": 1, "steps": 0}}}, "clip.max_norm.warmup.steps", "must be"),
    ({"policy": "zclip", "chain": [1.0]}, "clip.chain", "does not go with clip.policy: give one of them"),
    ({"chain": [1.0], "window": 3}, "clip.window", "there is no such key; known are chain"),
    ({"chain": []}, "clip.chain", "must be a list of policies, not []"),
    ({"chain": {"policy": "zclip"}}, "clip.chain", "must be a list of policies"),
    ({"chain": [1.0, {"policy": "zclip", "alpha": 2}]}, "clip.chain[1].alpha", "must "),
    ({"chain": [1.0, None]}, "clip.chain[1]", "must be a number or a policy"),
    ({"chain": [{"policy": "value", "clip_value": 1.0}, 1.0]}, "clip.chain", "ValueClip clamps elements"),
    ({"per_parameter": {"per_parameter": 1.0}}, "clip.per_parameter", "asks for norms of its own"),
    ({"per_group": {"w": 1.0}}, "clip.per_group.w", "must have patterns of parameters and a policy"),
    ({"per_group": {"w": {"patterns": 3, "max_norm": 1}}}, "clip.per_group.w.patterns", "must be str or a list of str"),
    ({"per_group": {"w": {"patterns": ["a"]}}}, "clip.per_group.w.max_norm", "needs it"),
    ({"per_group": {"w.x": MEMBER}}, "clip.per_group", "names without dots, got 'w.x'"),
    ({"per_group": []}, "clip.per_group", "must be groups by name, not []"),
    ({"shadow": {"z": 1.0}}, "clip.shadow", "must be policies by names, one of them acting"),
    ({"shadow": {"acting": 1.0, 3: 1.0}}, "clip.shadow", "must be policies by names, one of them acting"),
]


@pytest.mark.parametrize(("said", "key", "reason"), WRONG, ids=str)
def test_what_is_wrong_is_named_by_its_key(said, key, reason):
    with pytest.raises(ConfigError) as caught:
        policy_of(said, "clip")
    assert caught.value.key == key
    assert reason in str(caught.value)


# ---- whole configs ------------------------------------------------------------------------------------------


def read(*words: str) -> Any:
    return read_config(CONFIGS / "quickstart.yaml", words).clip.policy


def test_a_policy_on_the_command_line_takes_the_place_of_the_files():
    assert read() == MaxNorm(1.0)
    assert read("clip.policy=none") == MaxNorm(inf)
    assert read("clip.policy=value", "clip.clip_value=0.5") == ValueClip(0.5)
    assert read("clip.policy=zclip") == ZClip(max_norm=1.0)  # a field that both have stays
    assert read("clip.policy=zclip", "clip.max_norm=null", "clip.alpha=0.5") == ZClip(alpha=0.5)
    assert read("clip.chain=[{policy: zclip}, 2.0]") == Chain(ZClip(), 2.0)
    assert read("clip.per_parameter.policy=autoclip", "clip.per_parameter.window=5") == PerParameter(AutoClip(window=5))
    with pytest.raises(ConfigError, match=r"^clip.window: there is no such key"):
        read("clip.window=5")
    with pytest.raises(ConfigError, match=r"^clip.nonfinit: there is no such key; did you mean clip.nonfinite?"):
        read("clip.nonfinit=skip")


@pytest.mark.parametrize(("said", "policy"), SAID[1:], ids=str)
def test_a_config_with_it_reads_back_as_itself(said, policy, tmp_path: Path):
    document = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text()) | {"clip": {**said, "nonfinite": "raise"}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(document))
    config = read_config(tmp_path / "one.yaml")
    assert config.clip.policy == policy
    (tmp_path / "two.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "two.yaml") == config


PIPELINE = ["parallel.pipeline=2", "parallel.strategy=none"]


@pytest.mark.parametrize("words", [[], PIPELINE], ids=["fsdp2", "pipeline"])
def test_a_chain_that_looks_at_the_loss_trains_and_is_resumed(words, tmp_path: Path):
    """The mean loss that the policy sees is the one in the records, whichever ranks have one."""
    skips = "{policy: skip_spikes, on: [norm, loss], window: 4, patience: 2}"
    clip = f"clip.chain=[{skips}, {{per_parameter: {{policy: autoclip, window: 3}}}}, 0.5]"
    words = [*TINY, *words, "model.layers=2", "train.batch_size=16", f"run.dir={tmp_path / 'run'}", clip]
    assert run_ranks(train_here, 2, "quickstart.yaml", [*words, "train.steps=4"]) == [0, 0]
    assert run_ranks(train_here, 2, "quickstart.yaml", [*words, "train.steps=6", "resume=true"]) == [0, 0]
    assert len(metrics(tmp_path / "run")) == 6
    whole = [*words[:-2], f"run.dir={tmp_path / 'whole'}", clip, "train.steps=6"]
    assert run_ranks(train_here, 2, "quickstart.yaml", whole) == [0, 0]
    for name in ("loss", "norm", "coef", "skip"):
        assert [row[name] for row in metrics(tmp_path / "run")] == [row[name] for row in metrics(tmp_path / "whole")]
