"""Any installed engine may help; none is downloaded; context words count."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest
import spacy
from fedloop_privacy.masking import Masker, MaskingError
from fedloop_privacy.masking.analyzer import Analyzer, blank_engine
from presidio_analyzer.nlp_engine import SpacyNlpEngine


def _ruler_engine(tmp_path: Path | None = None) -> SpacyNlpEngine:
    """An engine that knows one name that is on no list, as a trained one might."""
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "zorblax"}])  # type: ignore[attr-defined]
    if tmp_path:
        pipeline.to_disk(tmp_path)
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "ruler"}])
    engine.nlp = {"en": pipeline}  # type: ignore[assignment]
    return engine


def test_a_context_word_raises_the_score() -> None:
    analyzer = Analyzer(None, 5.0)

    def score(text: str) -> float:
        return max(span.score for span in analyzer.find(text, monotonic() + 5) if span.type == "PHONE_NUMBER")

    assert score("phone 0171 555 2368") > score("thing 0171 555 2368") + 0.3


def test_an_engine_of_the_user_adds_what_it_finds() -> None:
    assert "zorblax" in Masker().mask("i told zorblax about it").text
    assert Masker(_ruler_engine()).mask("i told zorblax about it").text == "i told <PERSON_1> about it"


def test_batches_through_a_users_engine_give_the_same() -> None:
    masker = Masker(_ruler_engine())
    texts = [f"i told z\u00f3rblax and John Smith {n} times" for n in range(70)]
    assert masker.mask_many(texts) == [masker.mask(text) for text in texts]
    assert masker.mask_many(texts)[0].counts == {"PERSON": 2}


def test_settings_name_an_installed_model(tmp_path: Path) -> None:
    _ruler_engine(tmp_path / "model")
    config = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": str(tmp_path / "model")}]}
    assert Masker.from_config(config).mask("i told zorblax").text == "i told <PERSON_1>"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": "en_core_web_lg"}]}, "not installed"),
        ({"nlp_engine_name": "spacy", "models": [{"lang_code": "en"}]}, "model_name"),
        ({"nlp_engine_name": "spacy", "models": []}, "cannot be built"),
        ({"nlp_engine_name": "transformers", "models": [{"lang_code": "en", "model_name": {}}]}, "transformers"),
        ({}, "cannot be built"),
    ],
)
def test_a_model_that_is_not_there_is_a_clear_error(
    config: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spacy.cli.download", lambda *_: pytest.fail("tried to download"))
    with pytest.raises(MaskingError, match=says):
        Masker.from_config(config)


def test_an_engine_that_is_not_loaded_is_not_left_to_download() -> None:
    with pytest.raises(MaskingError, match="not installed"):
        Masker(SpacyNlpEngine())


def test_the_blank_engine_fills_the_lemmas() -> None:
    assert blank_engine().process_text("My PHONE", "en").lemmas == ["my", "phone"]


def test_presidio_keeps_texts_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    Masker().mask("IBAN XX00 AAAA 1111 2222 3333 44")
    assert caplog.text == ""
