"""A model that chats, from its making to a release that learnt, through the command line, with processes that are killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
from fedloop_clients import Agent
from fedloop_clients.device import Settings

from .conftest import Fedloop
from .test_whole import running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ANSWERS = {"where is my card": "we have sent it", "the card is lost": "a new one is sent", "a loan": "yes", "the house": "no"}


def rows(path: Path, *found: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def completions(path: Path, times: int) -> Path:
    said = [
        {"prompt": f"{prompt} {number}", "completion": answer} for number in range(times) for prompt, answer in ANSWERS.items()
    ]
    return rows(path, *said)


def test_by_hand_with_a_server_and_an_agent_killed_in_the_middle_of_a_round(fedloop: Fedloop, tmp_path: Path) -> None:
    models, directory, stores = tmp_path / "models", tmp_path / "deployment", [tmp_path / "one", tmp_path / "two"]
    tiny.save(models / "tiny")
    base = ("--model", "tiny", "--model-dir", models)
    files = ("--test", completions(tmp_path / "test.jsonl", 3), "--public", completions(tmp_path / "public.jsonl", 1))
    make = ("server", "init", directory, "--task", "chat", *base, *files, "--layers", "2", "--no-dp", "--json")
    made = fedloop(*make).document
    assert (made["layers"], made["rank"], made["held_out"]) == (2, 8, 12)
    assert fedloop(*make).status == 0
    for store in stores:
        terms = ("--store", store, "--client-id", store.name, "--key-from", "file", "--no-dp", "--json")
        assert fedloop("agent", "enrol", directory, *terms).document["client_id"] == store.name
        data = completions(tmp_path / f"{store.name}.jsonl", 8)
        given = ("agent", "feedback", "--store", store, "--data", data, "--model-dir", models, "--json")
        taken_in = [fedloop(*given).document for _ in range(2)]
        assert [(each["recorded"], each["right"]) for each in taken_in] == [(32, None), (0, None)]
    said = ("--store", stores[1], "--model-dir", models, "--json")
    answered = fedloop("agent", "predict", *said, "--text", "a house").document
    shown = ("agent", "feedback", *said, "--text", "a house", "--predicted", "perhaps")
    kept = fedloop(*shown, "--signal", "copied").document["response_id"]
    chosen = ("agent", "feedback", *said, "--response", kept, "--preferred-over", answered["response_id"])
    assert fedloop(*chosen).document["response_id"] == kept
    with Agent.open(stores[0], settings=Settings(model_dir=models / "tiny")) as agent:
        asked = [{"role": "user", "content": "where is my card 1"}]
        first, second = (agent.chat(asked, temperature=1.0, seed=seed) for seed in (1, 2))
        agent.feedback(first.response_id, preferred_over=second.response_id)
        assert first.text != second.text
        agent.run(until=lambda status: status.settled)
        assert agent.status().examples == 33
    assert fedloop("round", "start", directory, "--rounds", "2").status == 0

    with (
        running("agent", "run", "--store", stores[0], "--model-dir", models),
        running("agent", "run", "--store", stores[1], "--model-dir", models) as two,
        running("server", "run", directory) as server,
    ):
        until(server, "r0001 opened")
        server.send_signal(signal.SIGKILL)
        two.send_signal(signal.SIGKILL)
    with (
        running("agent", "run", "--store", stores[0], "--model-dir", models) as one,
        running("agent", "run", "--store", stores[1], "--model-dir", models),
        running("server", "run", directory, "--rounds", "2") as server,
    ):
        assert server.wait(200) == 0
        one.send_signal(signal.SIGTERM)
        assert one.wait(60) == 0

    listed = fedloop("round", "list", directory, "--json").document["rounds"]
    assert [(each["state"], each["kind"], each["participants"]) for each in listed] == [
        ("published", "train", ["one", "two"])
    ] * 2
    rebuilt = fedloop("release", "rebuild", directory, "--json")
    assert (rebuilt.status, rebuilt.document["identical"]) == (0, True)
    assert fedloop("log", "verify", directory, "--json").document["verified"]
    with Agent.open(stores[0], settings=Settings(model_dir=models / "tiny")) as agent:
        learnt = agent.chat(asked)
    assert learnt.release == listed[1]["release"]
    losses = [each["metrics"]["loss_per_token"] for each in fedloop("release", "list", directory, "--json").document["releases"]]
    assert losses == sorted(losses, reverse=True)


def test_an_option_of_another_task_or_a_model_that_is_not_there_is_one_clear_error(fedloop: Fedloop, tmp_path: Path) -> None:
    test = completions(tmp_path / "test.jsonl", 1)
    make = ("server", "init", tmp_path / "deployment", "--task", "chat", "--test", test)
    for wrong, said in (
        (("--labels", test), "--labels is an option of the task classification"),
        (("--layers", "many"), "--layers"),
        (("--learns", "everything"), "--learns everything is not known"),
        (("--model", "nowhere"), "no base model 'nowhere'"),
    ):
        ended = fedloop(*make, *wrong)
        assert ended.status in (1, 2)
        assert said in ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "deployment").exists()


def test_the_demo_of_a_chat_shows_what_was_measured_and_five_answers(tmp_path: Path) -> None:
    """With the real model, and a file in which some rows are right answers, some pairs, some judged."""
    prompts = {"Where is my card?": "It is on its way.", "I lost my card.": "It is frozen now.", "What does it cost?": "Nothing."}
    told: list[Any] = [{"prompt": prompt, "completion": answer} for prompt, answer in prompts.items()] * 2
    told += [{"prompt": prompt, "chosen": answer, "rejected": "No idea."} for prompt, answer in prompts.items()]
    told += [{"prompt": prompt, "completion": "No idea.", "label": False} for prompt in prompts]
    pairs = [{"prompt": f"Hello. {prompt}", "chosen": answer, "rejected": "No idea."} for prompt, answer in prompts.items()]
    data, test = rows(tmp_path / "data.jsonl", *told), rows(tmp_path / "test.jsonl", *pairs, *pairs)
    directory = tmp_path / "run"
    files = ("--task", "chat", "--data", data, "--test", test, "--dir", directory)
    with running("demo", *files, "--clients", "2", "--rounds", "2", "--no-dp", "--json") as demo:
        out, err = demo.communicate(timeout=500)
    assert demo.returncode == 0, err
    found = json.loads(out)
    assert found["task"] == "chat"
    assert found["baseline_metrics"].keys() == {"loss_per_token", "exact_match", "token_f1", "preference_accuracy"}
    assert found["final_metrics"]["loss_per_token"] < found["baseline_metrics"]["loss_per_token"]
    assert [each["metrics"].keys() for each in found["rounds"]] == [found["final_metrics"].keys()] * 2
    assert [sample["wanted"] for sample in found["samples"]] == [*prompts.values(), *prompts.values()][:5]
    assert all(sample.keys() == {"prompt", "before", "after", "wanted"} for sample in found["samples"])
    assert found["checks"]["log_verified"]
    assert found["checks"]["rebuilt_identical"]
    assert sum(each["examples"] for each in found["clients"]) == len(told)
