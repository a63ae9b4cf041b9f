"""Updates in few bits: how far off they are, and that nothing overflows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fedloop_events.blobs import tensors
from fedloop_events.errors import TensorError
from fedloop_events.types import BlobRef, RoundOpened
from fedloop_tasks import updates
from fedloop_tasks.task import TermsError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
TINY = 2.0**-110


def opened(bits: float | None, program: str = "fedavg") -> RoundOpened:
    return RoundOpened(
        origin="tests", epoch=1, run_id="main", round_id="r0001", request_id="q", number=1, model="m", base_release="0000-x",
        base=BlobRef("0" * 64, 1), strategy=program, cohort=[], quorum=1, deadline_s=1.0, upload=["a", "b"],
        max_upload_bytes=1000, max_update_norm=3.0, hyperparameters={} if bits is None else {"update_bits": bits},
    )  # fmt: skip


def values(most: float) -> st.SearchStrategy[NDArray[np.float32]]:
    elements = st.floats(-most, most, width=32) | st.just(0.0)
    return hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=40), elements=elements)


SIZES = st.sampled_from([float(np.float32(each)) for each in (1e-37, 1e-6, 1.0, 1e4, 1e38)])
UPDATES = SIZES.flatmap(lambda most: st.fixed_dictionaries({"a": values(most), "b": values(most)}))


def changes(bits: int, trained: Arrays) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of an update whose base is zero: the values, what is decoded, and the largest of each one's block."""
    base = {name: np.zeros_like(each) for name, each in trained.items()}
    terms = opened(bits)
    sent = updates.encode(terms, base, trained)
    assert tensors.specs(sent) == updates.sent(tensors.specs(trained), terms)
    decoded = updates.decode(terms, base, sent)
    assert tensors.specs(decoded) == tensors.specs(trained)
    flat, found = (np.concatenate([each.reshape(-1) for each in got.values()]).astype(np.float64) for got in (trained, decoded))
    pieces = [*updates.changes(sent)]
    np.testing.assert_array_equal(np.concatenate(pieces) if pieces else [], found)
    largest = np.zeros_like(flat)
    for start in range(0, len(flat), updates.BLOCK):
        largest[start : start + updates.BLOCK] = np.abs(flat[start : start + updates.BLOCK]).max()
    return flat, found, largest


@given(UPDATES)
def test_in_8_bits_a_value_is_off_by_at_most_a_254th_of_the_largest_of_its_block(trained: Arrays) -> None:
    flat, found, largest = changes(8, trained)
    assert np.isfinite(found).all()
    assert (np.abs(found - flat) <= largest / 254 * (1 + 2**-15) + TINY).all()


@given(UPDATES)
def test_in_16_bits_a_value_is_off_by_at_most_2_to_the_minus_11_of_itself(trained: Arrays) -> None:
    flat, found, largest = changes(16, trained)
    assert np.isfinite(found).all()
    assert (np.abs(found - flat) <= np.maximum(np.abs(flat) * 2.0**-11, largest * 2.0**-39) + TINY).all()


def test_what_is_rounded_is_the_change_and_not_the_value() -> None:
    base = {"a": np.full((2, 3), 100, np.float32)}
    trained = {"a": base["a"] + np.float32(0.001)}
    terms = opened(8)
    decoded = updates.decode(terms, base, updates.encode(terms, base, trained))
    np.testing.assert_allclose(decoded["a"], trained["a"], rtol=0, atol=1e-5)


def test_an_update_in_8_bits_is_little_more_than_a_quarter_as_large() -> None:
    random = np.random.default_rng(0)
    trained = {"a": random.normal(size=(576, 8)).astype(np.float32), "b": random.normal(size=(8, 1536)).astype(np.float32)}
    base = {name: np.zeros_like(each) for name, each in trained.items()}
    sizes = [sum(map(len, tensors.encode(updates.encode(opened(bits), base, trained)))) for bits in (32, 16, 8)]
    assert sizes[1] < 0.54 * sizes[0]
    assert sizes[2] < 0.28 * sizes[0]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bits: int, wrong: float) -> None:
    trained = {"a": np.array([1, wrong], np.float32)}
    with pytest.raises(TensorError, match="not finite"):
        updates.encode(opened(bits), {"a": np.zeros(2, np.float32)}, trained)


def test_a_change_that_float32_cannot_hold_is_refused() -> None:
    most = np.full(2, np.finfo(np.float32).max, np.float32)
    with pytest.raises(TensorError, match="not finite"), np.errstate(over="ignore"):
        updates.encode(opened(8), {"a": -most}, {"a": most})


def test_a_round_that_says_nothing_sends_float32_as_it_is() -> None:
    trained = {"a": np.ones(3, np.float32)}
    assert updates.encode(opened(None), {}, trained) is trained
    assert updates.sent(tensors.specs(trained), opened(None)) == tensors.specs(trained)


@pytest.mark.parametrize(("bits", "program"), [(4, "fedavg"), (float("nan"), "fedavg"), (8, "sums"), (16, "sums")])
def test_other_bits_and_sums_in_few_are_refused(bits: float, program: str) -> None:
    with pytest.raises(TermsError, match="update_bits"):
        updates.bits(opened(bits, program))


def test_what_is_not_float32_is_not_sent_in_few_bits() -> None:
    with pytest.raises(TensorError, match="float32"):
        updates.sent(tensors.specs({"a": np.ones(3)}), opened(8))
    with pytest.raises(TensorError, match=r"update\.scales"):
        updates.sent(tensors.specs({updates.SCALES: np.ones(3, np.float32)}), opened(8))
