"""A release as a folder for PEFT: the card's program gives what the agent answers, and the card says where it comes from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from clients.classified import TEXTS, Classified
from clients.conftest import ORIGIN, DigitMasker
from devices import World
from fedloop_cli.main import app
from fedloop_clients import Agent
from fedloop_events import types
from fedloop_events.errors import TensorError, UsageError
from fedloop_privacy.dp import accounting
from fedloop_server.operations import exporting
from fedloop_server.operations.followed import Followed
from fedloop_tasks import card
from fedloop_tasks.models.folder import locate
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Export, Streamed
from safetensors.torch import load_file
from typer.testing import CliRunner

if TYPE_CHECKING:
    from fedloop_tasks.classification.model import EmbeddingClassifier

# PEFT 0.21 asks the base for an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ASKED = ["is my card lost", "I would like to borrow some money for a house, please, as soon as that can be done", "money", "hi"]
Classify = Callable[[list[str], Path, Path], tuple[list[str], list[float]]]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def program(folder: Path) -> Classify:
    """`classify` of the model card in `folder`."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    classify: Classify = names["classify"]
    return classify


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Classified:
    """A deployment whose second release has no tensor that is zero."""
    made = Classified(tmp_path_factory.mktemp("trained"))
    made.register()
    made.arrays = made.model.initial_arrays(0)
    made.release()
    random = np.random.default_rng(7)
    made.arrays = {name: random.normal(0, 0.05, value.shape).astype(np.float32) for name, value in made.arrays.items()}
    made.arrays["head.weight"] = 5 * made.model.embed(list(TEXTS.values()))
    made.release()
    made.server.append(
        types.ReleaseEvaluated(
            origin=ORIGIN,
            model="default",
            epoch=1,
            release=made.base_release,
            metrics={"accuracy": 0.875},
            leading="accuracy",
            examples=8,
            dataset_sha256="0" * 64,
        )
    )
    return made


@pytest.fixture(scope="module")
def folder(trained: Classified, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest release, as the command exports it."""
    out = tmp_path_factory.mktemp("exported") / "out"
    done = run("release", "export", trained.folder, out, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert {name: document[name] for name in ("release", "format", "folder", "notes")} == {
        "release": trained.base_release,
        "format": "peft",
        "folder": str(out),
        "notes": [],
    }
    assert sorted(each["name"] for each in document["files"]) == sorted(each.name for each in out.iterdir())
    for each in document["files"]:
        data = (out / each["name"]).read_bytes()
        assert (each["size_bytes"], each["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    return out


def expected(trained: Classified) -> EmbeddingClassifier:
    trained.model.load(trained.arrays)
    return trained.model


def test_the_program_on_the_card_answers_as_the_model_does(trained: Classified, folder: Path) -> None:
    model = expected(trained)
    labels, confidences = program(folder)([*ASKED, *TEXTS.values()], folder, locate(model.spec.base_model))
    wanted, sure = model.predict([*ASKED, *TEXTS.values()])
    assert labels == wanted
    assert len(set(labels)) > 1
    assert confidences == pytest.approx(sure, abs=1e-5)


def test_the_program_on_the_card_answers_as_an_agent_does(trained: Classified, folder: Path, tmp_path: Path) -> None:
    with Agent.enrol(trained.folder, tmp_path / "store", key_from="file", masker=DigitMasker()) as agent:
        answers = [agent.predict(text) for text in ASKED]
    labels, confidences = program(folder)(ASKED, folder, locate(trained.model.spec.base_model))
    assert labels == [each.answer for each in answers]
    assert confidences == pytest.approx([each.confidence for each in answers], abs=1e-5)


def test_peft_takes_every_tensor_of_the_adapter_and_adapts_nothing_else(trained: Classified, folder: Path) -> None:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModel

    base = AutoModel.from_pretrained(locate(trained.model.spec.base_model))
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder), save_embedding_layers=False)
    written = load_file(folder / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(np.array_equal(loaded[name].numpy(), written[name].numpy()) for name in written)
    ours = sorted(value.tobytes() for name, value in trained.arrays.items() if name.startswith("lora."))
    assert sorted(value.numpy().tobytes() for value in written.values()) == ours
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 4.0)
    assert config["base_model_name_or_path"] == trained.model.spec.base_model


def test_the_card_names_release_base_evaluation_and_tensors(trained: Classified, folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    for part in (trained.base_release, trained.model.spec.base_sha256, trained.base.sha256, "accuracy: 0.8750"):
        assert part in card


def test_an_earlier_release_can_be_named_with_the_folder_or_with_the_log(trained: Classified, tmp_path: Path) -> None:
    first = next(iter(Followed(trained.log).releases.releases))
    for number, named in enumerate([(trained.folder, first), ("--log", trained.folder, first)]):
        out = tmp_path / str(number)
        assert run("release", "export", *named, out).exit_code == 0
        assert f"# Release {first} of default" in (out / "README.md").read_text()
    out = tmp_path / "current"
    assert run("release", "export", "--log", trained.folder, out).exit_code == 0
    assert f"# Release {trained.base_release} of default" in (out / "README.md").read_text()


def test_a_folder_that_is_not_empty_or_no_folder_is_refused_and_stays_as_it_is(trained: Classified, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file", "absent/below"):
        done = run("release", "export", trained.folder, tmp_path / name)
        assert isinstance(done.exception, UsageError) or done.exit_code == 2
    assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")) == ["empty", "file", "full", "full/mine"]
    assert run("release", "export", trained.folder, tmp_path / "empty").exit_code == 0
    assert (tmp_path / "empty" / "README.md").is_file()


def test_a_format_that_the_model_does_not_have_is_refused_with_those_that_it_has(trained: Classified, tmp_path: Path) -> None:
    for form in ("gguf", "merged", "pickle", ""):
        done = run("release", "export", trained.folder, tmp_path / "out", "--format", form)
        assert isinstance(done.exception, UsageError)
        assert done.exception.message == f"this model cannot be exported as {form!r}, but as peft"
    assert not any(tmp_path.iterdir())
    assert run("release", "export", trained.folder, tmp_path / "out", "--format", "peft").exit_code == 0


def test_what_has_no_room_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    def chunks() -> Iterator[bytes]:
        computed.append(1)
        yield b""

    computed: list[int] = []
    export = Export({"model.safetensors": Streamed(2**62, chunks())})
    with pytest.raises(UsageError, match=r"the release needs 4,611,686,018,427,453,440 bytes, and [0-9,]+ are free where"):
        exporting.write(exporting.Exported("0001-a", "merged", export), tmp_path / "out")
    assert not computed
    assert not any(tmp_path.iterdir())


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def chunks(error: BaseException) -> Iterator[bytes]:
        yield b"half"
        raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), UsageError("not finite")):
        export = Export({"README.md": b"card", "model.safetensors": Streamed(8, chunks(error))})
        with pytest.raises((UsageError, KeyboardInterrupt)) as raised:
            exporting.write(exporting.Exported("0001-a", "merged", export), tmp_path / "out")
        assert not any(tmp_path.iterdir())
        if isinstance(error, OSError):
            assert "the disk is full" in str(getattr(raised.value, "cause", ""))


def test_a_kill_leaves_no_folder_of_that_name(tmp_path: Path, in_child: Callable[[Callable[[], object]], int]) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        os.kill(os.getpid(), signal.SIGKILL)

    export = Export({"README.md": b"card", "model.safetensors": Streamed(8, chunks())})
    exported = exporting.Exported("0001-a", "merged", export)
    assert in_child(lambda: exporting.write(exported, tmp_path / "out")) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    whole = exporting.Exported("0001-a", "peft", Export({"README.md": b"card"}))
    assert [each.name for each in exporting.write(whole, tmp_path / "out")] == ["README.md"]


def test_tensors_that_are_no_release_of_the_model_are_refused(trained: Classified) -> None:
    provenance = exporting.provenance(Followed(trained.log), trained.base_release)
    task = task_of(trained.model.spec)
    for wrong in ({"other": trained.arrays["head.bias"]}, {"lora.5.query.A": trained.arrays["head.weight"]}):
        with pytest.raises(TensorError, match="not an adapter and a head"):
            task.export({**trained.arrays, **wrong}, provenance, "peft", None)


def test_the_provenance_is_the_rounds_that_led_to_a_release_and_what_they_cost(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.request(2)
    with world.serving():
        world.server().run(rounds=2)
    followed = Followed(world.log)
    zero, first, second = followed.releases.releases
    found = exporting.provenance(followed, second)
    accepted = {name: state.closed.accepted for name, state in followed.rounds.rounds.items() if state.closed is not None}
    hashes = {name: [each.blob.sha256 for each in given if each.blob is not None] for name, given in accepted.items()}
    assert [(each.release, each.base_release, each.round_id, each.updates) for each in found.steps] == [
        (second, first, "r0002", hashes["r0002"]),
        (first, zero, "r0001", hashes["r0001"]),
        (zero, None, None, []),
    ]
    assert [len(each.updates) for each in found.steps] == [2, 2, 0]
    text = card.written([], found, [])
    assert all(f"- {name}: `{each}`" in text for name, given in hashes.items() for each in given)
    mechanisms = [each.mechanism for each in found.steps if each.mechanism is not None]
    assert found.unprotected == ([] if len(mechanisms) == 2 else ["r0002", "r0001"])
    if mechanisms:
        client = followed.identities.clients["ann"]
        assert (found.epsilon, found.delta) == (accounting.epsilon(mechanisms, client.delta), client.delta)
        assert 0 < exporting.provenance(followed, first).epsilon < found.epsilon
    assert exporting.provenance(followed, zero).epsilon == 0.0
    with pytest.raises(UsageError, match="no release of that name"):
        exporting.export(followed, world.blobs, "0009-abc")
