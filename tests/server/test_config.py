"""The server's configuration: every key explained, every wrong one named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from fedloop_events.errors import UsageError
from fedloop_server.config import ServerConfig, decode, dump, load, meaning
from fedloop_tasks.classification.plan import ClassificationPlan


@pytest.mark.parametrize(
    "config",
    [
        ServerConfig(plan=ClassificationPlan()),
        ServerConfig(plan=ClassificationPlan(epsilon=None)),
        ServerConfig(
            plan=ClassificationPlan(epsilon=3.5, strategy="fedavg", sampling_rate=0.1, steps=3, head_lr=1.0),
            model_dir='a "b" \\ c\n',
        ),
    ],
)
def test_what_is_written_is_read_back(config: ServerConfig, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(dump(config))
    assert load(tmp_path / "server.toml", ClassificationPlan) == config


def test_every_key_has_a_meaning_in_the_file_that_is_written() -> None:
    fields = [*ClassificationPlan.__struct_fields__, *(name for name in ServerConfig.__struct_fields__ if name != "plan")]
    assert list(meaning(ClassificationPlan)) == fields
    text = dump(ServerConfig(plan=ClassificationPlan()))
    assert all(f"# {said}\n{key} = " in text for key, said in meaning(ClassificationPlan).items())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epsilom = 2", ["epsilom", 'did you mean "epsilon"']),
        ("epsilon = -1", ["epsilon = -1", "> 0.0"]),
        ("epsilon = inf", ["epsilon = inf", "finite"]),
        ("epsilon = true", ["epsilon = True"]),
        ("epsilon = 'lots'", ["epsilon = 'lots'", '"none"']),
        ("delta = 1", ["delta = 1", "< 1.0"]),
        ("delta = 0.01", ["delta = 0.01", "nominal_examples"]),
        ("quorum = 0", ["quorum = 0", ">= 1"]),
        ("quorum = 100", ["quorum = 100", "cohort_size, which is 64"]),
        ("quorum = 1.5", ["quorum = 1.5", "int"]),
        ("quorum = 'default'", ["quorum = 'default'", "int"]),
        ("strategy = 'median'", ["strategy = 'median'", '"ffa"', '"fedavg"']),
        ("planned_rounds = 1", ["planned_rounds = 1", "2 or more"]),
        ("sums_share = 1.0", ["sums_share = 1.0", "below 1"]),
        ("clip_norm = nan", ["clip_norm = nan", "finite"]),
        ("cohort_size = 10000", ["cohort_size = 10000", "1500"]),
        ("over_selection = 0.5", ["over_selection = 0.5", ">= 1.0"]),
        ("cohort_size = 1000\nover_selection = 1.6", ["over_selection = 1.6", "cohort_size is 1000", "1500"]),
        ("buffer_size = 1", ["buffer_size = 1", "quorum (2)", "cohort_size (64)"]),
        ("[quorum]\na = 1", ["quorum = {'a': 1}", "int"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(text: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        decode(tomllib.loads(text), ClassificationPlan)
    assert all(each in str(caught.value) for each in named), str(caught.value)


@pytest.mark.parametrize("data", [b"epsilon = ", b"\xff", None])
def test_a_file_that_is_no_toml_is_an_error_that_names_it(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "server.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=r"server\.toml cannot be read|there is no .*server\.toml"):
        load(path, ClassificationPlan)
