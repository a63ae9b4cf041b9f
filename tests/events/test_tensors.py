"""Tensor files: the format's own library is the oracle both ways, and nothing malformed gets through."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.errors import TensorError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]
printable = st.characters(min_codepoint=33, max_codepoint=126)
names = st.text(printable, min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
arrays = st.dictionaries(
    names,
    st.sampled_from(DTYPES).flatmap(lambda code: hnp.arrays(code, shapes)),
    max_size=5,
)


def file(values: Arrays) -> bytes:
    return b"".join(bytes(chunk) for chunk in tensors.encode(values))


def made(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def same(one: Arrays, other: Arrays) -> bool:
    parts = [{name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()} for arrays in (one, other)]
    return parts[0] == parts[1]


@given(arrays)
def test_what_is_written_is_read_in_the_same_order_and_by_the_formats_own_library(values: Arrays) -> None:
    data = file(values)
    decoded = tensors.decode(data)
    assert list(decoded) == list(values)
    assert same(decoded, values)
    assert same(load(data), values)


@given(arrays)
def test_what_the_formats_own_library_writes_is_read(values: Arrays) -> None:
    assert same(tensors.decode(save(values, metadata={"format": "np"})), values)


@given(arrays)
def test_the_bytes_depend_on_nothing_but_the_values(values: Arrays) -> None:
    strided = {name: np.array(value, order="F") for name, value in values.items()}
    swapped = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in values.items()}
    assert file(values) == file(strided) == file(swapped)


@given(arrays, st.data())
def test_mutated_bytes_end_in_nothing_worse_than_a_tensor_error(values: Arrays, data: st.DataObject) -> None:
    mutated = bytearray(file(values))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        decoded = tensors.decode(bytes(mutated))
    except TensorError:
        return
    assert sum(array.nbytes for array in decoded.values()) <= len(mutated)


@given(st.binary(max_size=200))
def test_noise_ends_in_a_tensor_error(noise: bytes) -> None:
    with pytest.raises(TensorError):
        tensors.decode(made(noise))


def test_arrays_are_neither_copied_to_write_nor_to_read() -> None:
    values = np.arange(1000, dtype="f4")
    _, chunk = tensors.encode({"x": values})
    assert np.shares_memory(np.frombuffer(chunk, "f4"), values)
    data = file({"x": values})
    array = tensors.decode(data)["x"]
    assert np.shares_memory(array, np.frombuffer(data, "u1"))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
GOOD = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        made(b"{}")[:-1],
        made(b"[]"),
        made(b"nul"),
        made(
            made(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", bytes(4)),
            bytes(4),
        ),
        made(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        made(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', bytes(4)),
        made(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
        made(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)),
        made(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)),
        made(b"[" * 20_000),
        made({"a": entry([2**53, 2**53], 0, 4)}, bytes(4)),
        made({"a": entry([0, 2**60], 0, 0)}),
        made({"a": entry([-1], 0, 4)}, bytes(4)),
        made({"a": entry([1] * 9, 0, 4)}, bytes(4)),
        made({"a": entry([1], 0, 4, "F33")}, bytes(4)),
        made({"a": entry([1], 0, 4) | {"more": 1}}, bytes(4)),
        made({"": entry([1], 0, 4)}, bytes(4)),
        made({" a": entry([1], 0, 4)}, bytes(4)),
        made({"ä": entry([1], 0, 4)}, bytes(4)),
        made({"\ud800": entry([1], 0, 4)}, bytes(4)),
        made({"a" * 201: entry([1], 0, 4)}, bytes(4)),
        made({"__metadata__": {"a": 1}}),
        made(GOOD, bytes(11)),
        made(GOOD, bytes(13)),
        made(GOOD | {"b": entry([1], 4, 8)}, bytes(12)),
        made(GOOD | {"b": entry([1], 9, 13)}, bytes(13)),
        made(GOOD | {"b": entry([1], 8, 13)}, bytes(13)),
        made({"b": entry([1], 8, 12), "a": entry([2], 0, 8)}, bytes(12)),
        made({"a": entry([2], 0, 2, "BOOL")}, b"\x01\x02"),
        made({f"{number}": entry([0], 0, 0) for number in range(200_000)}),
    ],
    ids=range(32),
)
def test_a_malformed_file_is_refused(data: bytes) -> None:
    with pytest.raises(TensorError):
        tensors.decode(data)


def test_a_well_formed_file_is_read() -> None:
    assert tensors.decode(made(GOOD, bytes(12))).keys() == {"a", "b"}


def test_a_header_can_be_read_from_the_beginning_of_a_file() -> None:
    data = file({"x": np.zeros((3, 4), "f4")})
    entries, begin = tensors.read_header(data)
    assert (
        tensors.read_header(data[:begin], total_bytes=len(data)) == (entries, begin) == ([TensorSpec("x", "F32", (3, 4))], begin)
    )
    with pytest.raises(TensorError):
        tensors.read_header(data[:begin], total_bytes=len(data) + 1)


def test_a_large_header_is_read_only_where_it_is_allowed() -> None:
    data = file({f"layer.{number}": np.zeros(1, "f4") for number in range(2000)})
    with pytest.raises(TensorError):
        tensors.decode(data)
    assert len(tensors.decode(data, max_header_bytes=1 << 20)) == 2000


@pytest.mark.parametrize(
    "values",
    [
        {"x": np.zeros(1, "c8")},
        {"x": np.array(["text"])},
        {"x": np.array([object()])},
        {"x": np.zeros((1,) * 9)},
        {"": np.zeros(1)},
        {"__metadata__": np.zeros(1)},
        {"x y": np.zeros(1)},
    ],
    ids=range(7),
)
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(values: Arrays) -> None:
    with pytest.raises(TensorError):
        next(iter(tensors.encode(values)))


def test_check_names_the_first_difference() -> None:
    expected = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (1,))]
    tensors.check(expected, list(expected))
    for got, message in (
        ([TensorSpec("a", "F32", (3, 2)), expected[1]], r"tensor a is F32 \[3, 2\], not F32 \[2, 3\]"),
        ([expected[0], TensorSpec("b", "F64", (1,))], "tensor b is F64"),
        ([expected[1], expected[0]], "tensor 0 is not a"),
        (expected[:1], "1 tensors, not 2"),
        ([*expected, TensorSpec("c", "F32", ())], "3 tensors, not 2"),
    ):
        with pytest.raises(TensorError, match=message):
            tensors.check(got, expected)


def test_free_text_in_the_header_changes_no_tensor_and_is_read_where_it_is_asked_for() -> None:
    arrays = {"a": np.arange(3, dtype=np.float32)}
    plain, noted = (b"".join(map(bytes, tensors.encode(arrays, each))) for each in ({}, {"state": "x 1"}))
    assert plain == b"".join(map(bytes, tensors.encode(arrays)))
    assert list(tensors.decode(noted)) == ["a"]
    assert tensors.decode(noted)["a"].tobytes() == arrays["a"].tobytes()
    assert (tensors.metadata(plain), tensors.metadata(noted)) == ({}, {"state": "x 1"})
    with pytest.raises(TensorError):
        tensors.metadata(noted[:-1])
