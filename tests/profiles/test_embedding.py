"""Embedding files: both formats read, everything else refused with a clear message, nothing executed or shown."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_psa.profiles import EncoderError, SafetyEmbedding, load_embedding, save_embedding

OURS = {"format": "psa_embedding", "format_version": "1", "encoder": "some encoder"}


@pytest.fixture
def npy(tmp_path: Path) -> Callable[[object], Path]:
    def save(array: object) -> Path:
        path = tmp_path / "user.npy"
        np.save(path, array, allow_pickle=True)
        return path

    return save


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_one_user_as_npy(npy: Callable[[object], Path], dtype: str) -> None:
    embedding = load_embedding(npy(np.array([0.5, -1.25, 8.0], dtype=dtype)))
    assert embedding.vectors.dtype == torch.float32
    assert embedding.vectors.tolist() == [[0.5, -1.25, 8.0]]
    assert embedding.encoder is None


@pytest.mark.parametrize("order", ["C", "F"])
def test_several_users_as_npy(npy: Callable[[object], Path], order: str) -> None:
    array = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=np.float32, order=order)  # type: ignore[call-overload]
    assert load_embedding(npy(array)).vectors.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array(["1.0", "2.0"]),
        np.array([(1.0, 2.0)], dtype=[("a", "f4"), ("b", "f4")]),
    ],
    ids=["integers", "booleans", "complex", "text", "records"],
)
def test_what_is_not_floating_point_is_refused(npy: Callable[[object], Path], array: np.ndarray) -> None:
    with pytest.raises(EncoderError, match=r"user\.npy.*expected floating-point numbers"):
        load_embedding(npy(array))


class _Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


def test_code_in_an_npy_is_refused_and_never_run(npy: Callable[[object], Path], tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    path = npy(np.array([_Harmful(trace)], dtype=object))
    with pytest.raises(EncoderError, match=r"user\.npy is not a readable embedding"):
        load_embedding(path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)
    assert trace.exists(), "the file would not have run anything anyway"


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (1, 2, 3), ()])
def test_a_wrong_shape_is_refused(npy: Callable[[object], Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"user\.npy has shape .*expected \[dim\] for one user or \[users, dim\]"):
        load_embedding(npy(np.ones(shape, dtype=np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(npy: Callable[[object], Path], value: float) -> None:
    with pytest.raises(EncoderError, match=r"user\.npy holds values that are not numbers"):
        load_embedding(npy(np.array([1.0, value], dtype=np.float32)))


@pytest.mark.parametrize("kept", [0, 4, 40, 130, 1023])
def test_a_cut_off_npy_is_refused(npy: Callable[[object], Path], kept: int) -> None:
    path = npy(np.ones(256, dtype=np.float32))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EncoderError, match="damaged"):
        load_embedding(path)


def test_an_npz_under_the_name_of_an_npy_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "user.npy").open("wb") as file:
        np.savez(file, embedding=np.ones(3))
    with pytest.raises(EncoderError, match="not a readable embedding"):
        load_embedding(tmp_path / "user.npy")


def test_safetensors_come_back_with_values_and_encoder(tmp_path: Path) -> None:
    vectors = torch.tensor([[0.1, -2.0], [3.0, 4.0]])
    save_embedding(SafetyEmbedding(vectors, "llm:some model"), tmp_path / "user.safetensors")
    loaded = load_embedding(tmp_path / "user.safetensors")
    assert torch.equal(loaded.vectors, vectors)
    assert loaded.encoder == "llm:some model"


def test_an_unknown_encoder_stays_unknown(tmp_path: Path) -> None:
    save_embedding(SafetyEmbedding(torch.ones(1, 2)), tmp_path / "user.safetensors")
    assert load_embedding(tmp_path / "user.safetensors").encoder is None


def test_one_row_of_many_can_be_saved(tmp_path: Path) -> None:
    vectors = torch.arange(6.0).reshape(2, 3).T
    save_embedding(SafetyEmbedding(vectors[1:2]), tmp_path / "user.safetensors")
    assert load_embedding(tmp_path / "user.safetensors").vectors.tolist() == [[1.0, 4.0]]


def test_only_the_owner_can_read_a_saved_embedding(tmp_path: Path) -> None:
    path = tmp_path / "user.safetensors"
    save_embedding(SafetyEmbedding(torch.ones(1, 2)), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failing_save_leaves_the_old_embedding(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "user.safetensors"
    save_embedding(SafetyEmbedding(torch.ones(1, 2)), path)
    with full_disk(), pytest.raises(Exception, match="File too large"):
        save_embedding(SafetyEmbedding(torch.zeros(1, 500)), path)
    assert load_embedding(path).vectors.tolist() == [[1.0, 1.0]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"embedding": torch.ones(3)}, None),
        ({"embedding": torch.ones(3)}, OURS | {"format": "pt"}),
        ({"embedding": torch.ones(3)}, OURS | {"format": "psa_adapter"}),
        ({"embedding": torch.ones(3)}, OURS | {"format_version": "2"}),
        ({"another": torch.ones(3)}, OURS),
        ({"embedding": torch.arange(3)}, OURS),
    ],
    ids=["no format", "another format", "an adapter", "another version", "another tensor", "integers"],
)
def test_safetensors_of_another_kind_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "user.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(EncoderError, match=r"user\.safetensors.*psa_embedding version 1"):
        load_embedding(path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_cut_off_safetensors_are_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "user.safetensors"
    save_embedding(SafetyEmbedding(torch.ones(1, 256)), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EncoderError, match="damaged"):
        load_embedding(path)


def test_half_precision_safetensors_become_float32(tmp_path: Path) -> None:
    path = tmp_path / "user.safetensors"
    save_file({"embedding": torch.tensor([0.5, 2.0], dtype=torch.bfloat16)}, path, OURS)
    loaded = load_embedding(path)
    assert loaded.vectors.dtype == torch.float32
    assert loaded.vectors.tolist() == [[0.5, 2.0]]


@pytest.mark.parametrize("name", ["user.npy", "user.safetensors", "user.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(EncoderError) as refused:
        load_embedding(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "user.txt").write_text("0.5 1.5", encoding="utf-8")
    with pytest.raises(EncoderError, match=r"expected floating-point numbers as \.npy"):
        load_embedding(tmp_path / "user.txt")


@pytest.mark.parametrize("shown", [repr, str, format, lambda embedding: repr([embedding])])
def test_an_embedding_shows_none_of_its_numbers(shown: Callable[[SafetyEmbedding], str]) -> None:
    text = shown(SafetyEmbedding(torch.tensor([[0.7654321, -54321.0]]), "llm:secret"))
    assert "SafetyEmbedding" in text
    assert not [part for part in ("7654", "0.76", "54321", "tensor", "secret") if part in text]


def test_a_file_of_this_format_is_plain_safetensors(tmp_path: Path) -> None:
    save_embedding(SafetyEmbedding(torch.ones(2, 3)), tmp_path / "user.safetensors")
    assert {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "user.safetensors").items()} == {
        "embedding": [2, 3]
    }
