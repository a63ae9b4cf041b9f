"""`fedloop feedback export`: what other trainers read, made of what the pipeline has curated."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import samples
import tiny_models as tiny
from fedloop_cli.main import app
from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_events.ids import derived_id
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_events.types import Reaction
from fedloop_events.writer import EventWriter
from fedloop_server.deployment import open_deployment
from fedloop_server.feedback.operators.curating import Curating
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import States
from fedloop_server.operations import commands
from fedloop_tasks.causal import corpus
from fedloop_tasks.classification import corpus as labelled
from fedloop_tasks.turns import Turn
from msgspec import structs
from typer.testing import CliRunner

QUESTION, ANSWER, BETTER = "where is my card, <PERSON_1>?", "no idea", "yes, we have sent it\n\u201cin the post\u201d \U0001f4ee"
EARLIER = [MaskedTurn("user", samples.masked("hello")), MaskedTurn("assistant", samples.masked("hi"))]
WORDS = {
    "corrected": Reaction(samples.masked(QUESTION), EARLIER, response=samples.masked(ANSWER), correction=samples.masked(BETTER)),
    "thumb": Reaction(samples.masked("a loan for a house"), response=samples.masked("no"), thumb="down"),
    "stars": Reaction(samples.masked(QUESTION), response=samples.masked(BETTER), rating=5),
}
LABELS = {name: Reaction(samples.masked(f"text {name}"), predicted=name[0], thumb="up") for name in ("a1", "a2", "b1")}
TRL = {
    "trl-sft": {"prompt", "completion"},
    "trl-kto": {"prompt", "completion", "label"},
    "trl-dpo": {"prompt", "chosen", "rejected"},
}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def curated(deployment: Path, tmp_path: Path) -> Path:
    """A deployment whose pipeline has curated examples of two use cases, one of which was withdrawn."""
    opened = open_deployment(deployment, None)
    writer = opened.writer
    origin = commands.identities(writer).origin
    events: list[types.Payload] = []
    for use_case, reactions in (("support", WORDS), ("moderation", LABELS)):
        for name, reaction in reactions.items():
            identity = derived_id(use_case, name)
            events.append(
                types.FeedbackScored(origin, use_case, identity, "c1", name, f"r-{name}", "r0", 0, 0, reaction, lane="high")
            )
    events.append(types.ScoreWithdrawn(origin, "moderation", "c1", "a2"))
    writer.append(*events)
    with States(tmp_path / "states.sqlite") as states:
        Pipeline(opened.log, writer, [Curating()], states).run(threading.Event(), until_idle=True)
    opened.log.close()
    return deployment


def exported(curated: Path, form: str, *arguments: object) -> tuple[Path, dict[str, Any]]:
    out = curated / f"{form}.jsonl"
    done = run("feedback", "export", curated, "--format", form, "--out", out, "--json", *arguments)
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_example_that_counts_is_in_the_file_and_nothing_that_names_a_client(curated: Path) -> None:
    path, document = exported(curated, "jsonl")
    assert document == {
        "file": str(path),
        "format": "jsonl",
        "examples": 6,
        "balance": [
            {"use_case": "moderation", "kind": "label", "examples": 2, "classes": {"a": 1, "b": 1}},
            {"use_case": "support", "kind": "dpo", "examples": 1, "classes": {}},
            {"use_case": "support", "kind": "kto", "examples": 2, "classes": {"desirable": 1, "undesirable": 1}},
            {"use_case": "support", "kind": "sft", "examples": 1, "classes": {}},
        ],
    }
    rows = rows_of(path)
    assert [(each["kind"], each["text"]) for each in rows if each["kind"] == "label"] == [
        ("label", "text a1"),
        ("label", "text b1"),
    ]
    assert not {"client_id", "feedback_id"} & {name for each in rows for name in each}
    assert len({each["example_id"] for each in rows}) == 6


def test_one_use_case_can_be_exported_alone(curated: Path) -> None:
    path, document = exported(curated, "jsonl", "--use-case", "moderation")
    assert [each["use_case"] for each in document["balance"]] == ["moderation"]
    assert {each["use_case"] for each in rows_of(path)} == {"moderation"}


def test_labels_are_read_again_as_a_file_of_messages(curated: Path) -> None:
    path, _ = exported(curated, "jsonl", "--use-case", "moderation")
    found = labelled.read(path)
    assert [(each.text, each.answer) for each in found.rows] == [("text a1", "a"), ("text b1", "b")]
    assert found.bad == []


def test_what_trl_reads_is_read_again_as_a_file_of_messages(curated: Path) -> None:
    read = {form: corpus.read(exported(curated, form)[0]) for form in TRL}
    assert [each.bad for each in read.values()] == [[], [], []]
    earlier = (Turn("user", "hello"), Turn("assistant", "hi"))
    (sft,), (dpo,) = read["trl-sft"].rows, read["trl-dpo"].rows
    assert (sft.text, sft.answer, sft.earlier) == (QUESTION, BETTER, earlier)
    assert (dpo.text, dpo.answer, dpo.rejected, dpo.earlier) == (QUESTION, BETTER, ANSWER, earlier)
    assert [(each.text, each.answer, each.good) for each in read["trl-kto"].rows] == [
        ("a loan for a house", "no", False),
        (QUESTION, BETTER, True),
    ]


@pytest.mark.parametrize("form", TRL)
def test_datasets_load_it_with_the_columns_that_trl_names(curated: Path, tmp_path: Path, form: str) -> None:
    loaded = dataset(exported(curated, form)[0], tmp_path)
    assert set(loaded.column_names) == TRL[form]
    for name, feature in loaded.features.items():
        if name == "label":
            assert feature.dtype == "bool"
        else:
            assert {key: value.dtype for key, value in feature.feature.items()} == {"role": "string", "content": "string"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own default
@pytest.mark.parametrize("form", TRL)
def test_trls_trainer_prepares_it(curated: Path, tmp_path: Path, form: str) -> None:
    loaded = dataset(exported(curated, form)[0], tmp_path)
    tokens = prepared(loaded, form, tiny.save(tmp_path / "model"), tmp_path)
    assert any(BETTER in text and QUESTION in text for text in tokens)


def dataset(path: Path, cache: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_json(str(path), cache_dir=str(cache))


def prepared(loaded: Any, form: str, folder: Path, scratch: Path) -> Sequence[str]:
    """The texts that the trainer of this format has made of the file, template and all."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = form.removeprefix("trl-").upper()
    config, trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config(output_dir=str(scratch), report_to=[], use_cpu=True, bf16=False, max_length=None),
        train_dataset=loaded,
        processing_class=tokenizer,
    )
    answers = {"SFT": ("input_ids",), "KTO": ("prompt_ids", "completion_ids"), "DPO": ("prompt_ids", "chosen_ids")}[name]
    return [tokenizer.decode([token for column in answers for token in row[column]]) for row in made.train_dataset]


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(curated: Path) -> None:
    path, _ = exported(curated, "trl-sft")
    path.write_text("mine")
    refused = run("feedback", "export", curated, "--format", "trl-sft", "--out", path)
    assert isinstance(refused.exception, UsageError)
    assert "--force" in refused.exception.hint
    assert path.read_text() == "mine"
    exported(curated, "trl-sft", "--force")
    assert len(rows_of(path)) == 1


def test_a_file_that_cannot_be_written_leaves_nothing(curated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for out in (folder, tmp_path / "absent" / "file", tmp_path / "states.sqlite" / "file"):
        refused = run("feedback", "export", curated, "--format", "jsonl", "--out", out, "--force")
        assert isinstance(refused.exception, UsageError), refused.output
    assert not list(folder.iterdir())
    assert stat.S_ISDIR(folder.stat().st_mode)


def test_nothing_to_export_is_said_with_what_there_is(curated: Path, deployment: Path, tmp_path: Path) -> None:
    refused = run("feedback", "export", curated, "--format", "trl-sft", "--use-case", "moderation", "--out", tmp_path / "out")
    assert isinstance(refused.exception, UsageError)
    assert "of use case 'moderation'" in refused.exception.message
    assert refused.exception.cause == "there are 2 label of moderation, 1 dpo of support, 2 kto of support, 1 sft of support"
    assert not (tmp_path / "out").exists()


def test_whoever_is_told_to_run_the_pipeline_can_export_then(deployment: Path, tmp_path: Path) -> None:
    opened = open_deployment(deployment, None)
    origin = commands.identities(opened.writer).origin
    given = structs.replace(samples.feedback(1), origin=origin, thumb=None, label="spam")
    EventWriter(opened.log, samples.key("device-1")).append(structs.replace(samples.enrolled(), origin=origin), given)
    opened.log.close()
    export = ("feedback", "export", deployment, "--format", "jsonl", "--out", tmp_path / "out")
    refused = run(*export)
    assert isinstance(refused.exception, UsageError)
    assert "`fedloop feedback run` curates examples" in refused.exception.hint
    done = run("feedback", "run", deployment, "--until-idle")
    assert done.exit_code == 0, done.output
    assert run(*export).exit_code == 0
    assert [(each["kind"], each["label"]) for each in rows_of(tmp_path / "out")] == [("label", "spam")]


def test_an_event_that_the_server_did_not_sign_is_no_example(curated: Path) -> None:
    opened = open_deployment(curated, None)
    forged = types.ExampleCurated(
        commands.identities(opened.writer).origin,
        "support",
        "0" * 32,
        "sft",
        "c1",
        "f",
        "1" * 32,
        "r0",
        samples.masked("x"),
        completion=masked("y"),
    )
    opened.log.append([samples.signed(forged, by="nobody")])
    opened.log.close()
    assert exported(curated, "trl-sft")[1]["examples"] == 1


def masked(text: str) -> MaskedText:
    return msgspec.convert({"text": text}, MaskedText)
