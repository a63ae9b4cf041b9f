"""The model card of an exported release: what every task says of one in the same way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from fedloop_tasks.task import Provenance, Step

NAME: Final = "README.md"
_NOT_KNOWN: Final = "Not known to the device that wrote this; the card of `fedloop release export` has it."


def as_json(value: object) -> bytes:
    """The bytes of a configuration beside the card."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def front(library: str, pipeline: str, base_model: str, licence: str = "") -> list[str]:
    """The metadata that Hugging Face's tools read from a card; `licence` is the base model's, if it is known."""
    return [
        f"base_model: {json.dumps(base_model)}",
        *([f"license: {json.dumps(licence)}"] if licence else []),
        f"library_name: {library}",
        f"pipeline_tag: {pipeline}",
        "tags: [lora, federated-learning, differential-privacy]",
    ]


def written(metadata: Sequence[str], provenance: Provenance, about: Sequence[str]) -> str:
    """The card: `about` says what the release is and how it is used; evaluation, privacy and lineage come from the log."""
    measured = [f"- {name}: {value:.4f}" for name, value in provenance.metrics.items()]
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# Release {provenance.release} of {provenance.model}",
            "",
            *about,
            "",
            "## Evaluation on the held-out set",
            "",
            *(measured or ["- not evaluated" if provenance.steps else _NOT_KNOWN]),
            "",
            "## Privacy",
            "",
            _privacy(provenance),
            "",
            "## Lineage, newest first",
            "",
            f"Tensors of this release: SHA-256 `{provenance.sha256}`.",
            "",
            *(_lineage(provenance) if provenance.steps else [_NOT_KNOWN, ""]),
        ]
    )


def _privacy(provenance: Provenance) -> str:
    if not provenance.steps:
        return _NOT_KNOWN
    if provenance.unprotected:
        return f"No bound: {', '.join(provenance.unprotected)} had no differential privacy."
    if not provenance.steps[0].round_id:
        return "This is the first release: nothing of a user went in."
    return (
        "What the updates that went in can tell about one example of one device is bounded by epsilon "
        f"{provenance.epsilon:.3f} at delta {provenance.delta:g}: the most of any device, with the mechanisms of all its rounds "
        "composed. This rests on each device adding its noise. Masked feedback in the log is not covered."
    )


def _lineage(provenance: Provenance) -> list[str]:
    return [
        "| release | round | strategy | base release | updates | noise multiplier | sampling rate | steps | clip norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(each) for each in provenance.steps),
        "",
        *_updates(provenance),
    ]


def _row(step: Step) -> str:
    mechanism = step.mechanism
    terms = ["", "", "", ""]
    if mechanism is not None:
        terms = [
            f"{value:g}" for value in (mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps, mechanism.clip_norm)
        ]
    cells = [step.release, step.round_id or "", step.strategy or "", step.base_release or "", str(len(step.updates)), *terms]
    return f"| {' | '.join(cells)} |"


def _updates(provenance: Provenance) -> list[str]:
    found = [f"- {step.round_id}: `{each}`" for step in provenance.steps for each in step.updates if each]
    return ["SHA-256 of the updates that went in, by round:", "", *found, ""] if found else []
