"""The server's configuration: every key explained, every wrong one named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from fedloop_events.errors import UsageError
from fedloop_server.config import ServerConfig, decode, dump, load, meaning
from fedloop_server.triggers import (
    AccuracyTrigger,
    DriftTrigger,
    EventTrigger,
    FeedbackTrigger,
    ForecastTrigger,
    SatisfactionTrigger,
    ScheduleTrigger,
    Trigger,
)
from fedloop_tasks.classification.plan import ClassificationPlan

TRIGGERS: tuple[Trigger, ...] = (
    FeedbackTrigger(name="enough", count=500, of="corrections", use_case="support"),
    SatisfactionTrigger(name="un.happy", below=0.7, cooldown_s=60.0, max_per_day=2, priority=9, rounds=3),
    AccuracyTrigger(name="wrong", below=1.0, over=200),
    DriftTrigger(name="drifted", metrics=("labels", "embeddings")),
    ForecastTrigger(name="soon", metric="accuracy", below=0.5, within_s=7200.0),
    ScheduleTrigger(name="nightly", cron="30 2 * * *"),
    EventTrigger(name="report"),
)


@pytest.mark.parametrize(
    "config",
    [
        ServerConfig(plan=ClassificationPlan()),
        ServerConfig(plan=ClassificationPlan(epsilon=None)),
        ServerConfig(
            plan=ClassificationPlan(epsilon=3.5, strategy="fedavg", sampling_rate=0.1, steps=3, head_lr=1.0),
            model_dir='a "b" \\ c\n',
        ),
        ServerConfig(plan=ClassificationPlan(), triggers=TRIGGERS, time_zone="Europe/Berlin"),
    ],
)
def test_what_is_written_is_read_back(config: ServerConfig, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(dump(config))
    assert load(tmp_path / "server.toml", ClassificationPlan) == config


def test_every_key_has_a_meaning_in_the_file_that_is_written() -> None:
    fields = [
        *ClassificationPlan.__struct_fields__,
        *(name for name in ServerConfig.__struct_fields__ if name not in {"plan", "triggers"}),
    ]
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
        ("trigger = 3", ["trigger = 3", "[trigger.enough]"]),
        ("[trigger]\nkind = 'drift'", ["trigger.kind = 'drift'", "table"]),
        ("[trigger.'two words']\nkind = 'drift'", ["'two words'", "1 to 40 ASCII"]),
        ("[trigger.a]\ncount = 5", ["[trigger.a]", "lacks kind", "feedback, satisfaction"]),
        ("[trigger.a]\nkind = 'drifts'", ["kind = 'drifts'", "[trigger.a]", 'did you mean "drift"', "schedule"]),
        ("[trigger.a]\nkind = 'feedback'", ["[trigger.a]", "lacks count", "since the last release"]),
        ("[trigger.a]\nkind = 'feedback'\ncount = 0", ["count = 0", "[trigger.a]", ">= 1", "since the last release"]),
        ("[trigger.a]\nkind = 'feedback'\ncount = true", ["count = True", "[trigger.a]"]),
        ("[trigger.a]\nkind = 'feedback'\ncount = 1\nof = 'low'", ["of = 'low'", '"corrections"']),
        ("[trigger.a]\nkind = 'satisfaction'\nbellow = 0.7", ['"bellow"', "[trigger.a]", 'did you mean "below"', "cooldown_s"]),
        ("[trigger.a]\nkind = 'satisfaction'\nbelow = nan", ["below = nan", "finite"]),
        ("[trigger.a]\nkind = 'accuracy'\nbelow = 0.7\nover = 501", ["over = 501", "<= 500"]),
        ("[trigger.a]\nkind = 'drift'\nmetrics = ['mood']", ["metrics = ['mood']", '"embeddings"']),
        ("[trigger.a]\nkind = 'drift'\nname = 'b'", ['"name"', "no key"]),
        ("[trigger.a]\nkind = 'schedule'\ncron = '61 * * * *'", ["cron = '61 * * * *'", "[trigger.a]", "no cron expression"]),
        ("[trigger.a]\nkind = 'event'\nmax_per_day = 0", ["max_per_day = 0", ">= 1", "24 hours"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(text: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        decode(tomllib.loads(text), ClassificationPlan)
    found = f"{caught.value.message} {caught.value.hint}"
    assert all(each in found for each in named), found


@pytest.mark.parametrize("data", [b"epsilon = ", b"\xff", None])
def test_a_file_that_is_no_toml_is_an_error_that_names_it(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "server.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=r"server\.toml cannot be read|there is no .*server\.toml"):
        load(path, ClassificationPlan)


def test_a_new_file_has_no_trigger_and_shows_some_that_can_be_taken_as_they_are() -> None:
    text = dump(ServerConfig(plan=ClassificationPlan()))
    assert decode(tomllib.loads(text), ClassificationPlan).triggers == ()
    before, _, examples = text.partition("As in:\n")
    shown = "\n".join(line.removeprefix("# ").removeprefix("#") for line in examples.splitlines())
    found = decode(tomllib.loads(f"{before}\n{shown}"), ClassificationPlan).triggers
    assert [(each.name, each.kind) for each in found] == [
        ("enough", "feedback"),
        ("unhappy", "satisfaction"),
        ("drifted", "drift"),
    ]
