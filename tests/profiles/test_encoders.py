"""The attributes encoder, number by number, and the cache of embeddings around an encoder."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comfyui_psa.profiles import (
    EncoderError,
    Profile,
    SafetyEmbedding,
    default_template,
    load_embedding,
    save_embedding,
    simulate_users,
)
from comfyui_psa.profiles.encoders import AttributesEncoder, CachedEncoder, LanguageModelEncoder, LanguageModelFiles

MARKER = "Zorblax"
CHILD, ADULT, SENIOR = Profile(age=9), Profile(age=35, religion="Islam"), Profile(age=80, gender="female")

# First position of each group of the attributes encoder.
BANS, AGE, AGE_GROUP, GENDER, RELIGION, PHYSICAL, MENTAL = 0, 7, 8, 16, 19, 24, 29


def _attributes(profile: Profile) -> list[float]:
    return [round(value, 4) for value in AttributesEncoder().encode([profile])[0].tolist()]


def _hot(profile: Profile, start: int = AGE_GROUP) -> list[int]:
    return [i for i, value in enumerate(_attributes(profile)) if i >= start and value]


def test_attributes_are_37_numbers_per_profile() -> None:
    vectors = AttributesEncoder().encode([CHILD, ADULT])
    assert vectors.shape == (2, 37)
    assert vectors.dtype == torch.float32


def test_attributes_of_nobody_are_an_empty_batch() -> None:
    assert AttributesEncoder().encode([]).shape == (0, 37)


def test_what_is_unsaid_is_zero() -> None:
    assert _attributes(Profile()) == [-1.0] * 7 + [0.0] * 30


def test_attributes_of_a_known_user() -> None:
    # 7 bans | age | 8 age groups | 3 gender | 5 religion | 5 physical | 8 mental
    user = Profile(
        age=9, gender="female", religion="Islam", physical_condition="visual impairment", mental_condition="war"
    )
    assert _attributes(user) == [
        *(1, 1, 1, 1, 1, 1, 1),
        0.09,
        *(0, 1, 0, 0, 0, 0, 0, 0),
        *(0, 1, 0),
        *(0, 1, 0, 0, 0),
        *(1, 0, 0, 0, 0),
        *(0, 0, 1, 0, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("category", "position"),
    [
        ("Hate", 0),
        ("Harassment", 1),
        ("Violence", 2),
        ("Self-Harm", 3),
        ("Sexuality", 4),
        ("Shocking", 5),
        ("Propaganda", 6),
    ],
)
def test_each_category_has_its_place(category: str, position: int) -> None:
    bans = _attributes(Profile(overrides={category: "ban"}))[BANS:AGE]  # type: ignore[dict-item]
    assert bans == [1.0 if i == position else -1.0 for i in range(7)]


@pytest.mark.parametrize(
    ("fields", "position"),
    [
        ({"gender": "male"}, GENDER),
        ({"gender": "female"}, GENDER + 1),
        ({"religion": "Christianity"}, RELIGION),
        ({"religion": "Buddhism"}, RELIGION + 2),
        ({"religion": "None"}, RELIGION + 3),
        ({"physical_condition": "hearing impairment"}, PHYSICAL + 1),
        ({"physical_condition": "healthy"}, PHYSICAL + 3),
        ({"mental_condition": "depression"}, MENTAL),
        ({"mental_condition": "natural disasters"}, MENTAL + 5),
        ({"mental_condition": "healthy"}, MENTAL + 6),
        ({"gender": "FEMALE"}, GENDER + 1),
        ({"religion": "none"}, RELIGION + 3),
    ],
)
def test_each_offered_value_has_its_place(fields: dict[str, str], position: int) -> None:
    assert _hot(Profile(**fields)) == [position]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "position"),
    [("gender", 18), ("religion", 23), ("physical_condition", 28), ("mental_condition", 36)],
)
def test_free_text_is_another_value(field: str, position: int) -> None:
    assert _hot(Profile(**{field: "in my own words"})) == [position]  # type: ignore[arg-type]


@pytest.mark.parametrize(("age", "group"), [(0, 0), (12, 1), (13, 2), (34, 3), (35, 4), (74, 5), (75, 6), (130, 7)])
def test_the_age_and_its_group(age: int, group: int) -> None:
    assert _attributes(Profile(age=age))[AGE] == age / 100
    assert _hot(Profile(age=age)) == [AGE_GROUP + group]


def test_attributes_ignore_name_and_notes_and_are_deterministic() -> None:
    named = ADULT.model_copy(update={"name": MARKER, "notes": MARKER})
    assert _attributes(named) == _attributes(ADULT) == _attributes(ADULT)


class CountingEncoder:
    """Encodes attributes, remembers for whom, and has the cache keys of a language model."""

    identity = "counting-1"

    def __init__(self, folder: Path) -> None:
        self.seen: list[list[Profile]] = []
        self._keys = LanguageModelEncoder("a/model", default_template(), LanguageModelFiles(folder))

    def cache_key(self, profile: Profile) -> str:
        return self._keys.cache_key(profile)

    def encode(self, profiles: Sequence[Profile]) -> Tensor:
        return torch.cat(list(self.encode_batches(profiles)))

    def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
        self.seen.append(list(profiles))
        yield from AttributesEncoder().encode_batches(profiles, batch_size)


@pytest.fixture
def encoder(tmp_path: Path) -> CountingEncoder:
    (tmp_path / "model").mkdir()
    return CountingEncoder(tmp_path / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "embeddings"


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_batches_are_the_whole_in_pieces(batch_size: int) -> None:
    users = simulate_users(7, seed=2)
    batches = list(AttributesEncoder().encode_batches(users, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 0 < len(batches[-1]) <= batch_size
    assert torch.equal(torch.cat(batches), AttributesEncoder().encode(users))


def test_batches_of_nobody_are_none() -> None:
    assert list(AttributesEncoder().encode_batches([])) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_from_a_half_filled_cache_keep_their_order(
    encoder: CountingEncoder, folder: Path, batch_size: int
) -> None:
    users = [Profile(age=age) for age in range(7)]
    cached = CachedEncoder(encoder, folder)
    cached.encode([users[1], users[4]])
    batches = list(cached.encode_batches(users, batch_size))
    assert [len(batch) for batch in batches] == [len(users[i : i + batch_size]) for i in range(0, 7, batch_size)]
    assert torch.equal(torch.cat(batches), AttributesEncoder().encode(users))
    assert encoder.seen[1:] == [[users[0], users[2], users[3], users[5], users[6]]]


def test_batches_that_were_taken_stay_when_the_rest_is_not(encoder: CountingEncoder, folder: Path) -> None:
    users = [Profile(age=age) for age in range(6)]
    next(CachedEncoder(encoder, folder).encode_batches(users, 2))
    assert len(list(folder.iterdir())) == 2
    CachedEncoder(encoder, folder).encode(users)
    assert encoder.seen[1] == users[2:]


def test_the_second_call_computes_nothing(encoder: CountingEncoder, folder: Path) -> None:
    first = CachedEncoder(encoder, folder).encode([CHILD, ADULT])
    second = CachedEncoder(encoder, folder).encode([CHILD, ADULT])
    assert encoder.seen == [[CHILD, ADULT]]
    assert torch.equal(first, second)
    assert torch.equal(first, AttributesEncoder().encode([CHILD, ADULT]))


def test_only_what_is_missing_is_computed_and_the_order_stays(encoder: CountingEncoder, folder: Path) -> None:
    cached = CachedEncoder(encoder, folder)
    cached.encode([ADULT])
    vectors = cached.encode([SENIOR, ADULT, CHILD])
    assert encoder.seen == [[ADULT], [SENIOR, CHILD]]
    assert torch.equal(vectors, AttributesEncoder().encode([SENIOR, ADULT, CHILD]))
    assert torch.equal(cached.encode([CHILD, SENIOR]), AttributesEncoder().encode([CHILD, SENIOR]))
    assert len(encoder.seen) == 2


@pytest.mark.parametrize("damage", [b"", b"not an embedding", None], ids=["empty", "nonsense", "cut off"])
def test_a_damaged_entry_is_computed_again_and_repaired(
    encoder: CountingEncoder, folder: Path, damage: bytes | None
) -> None:
    cached = CachedEncoder(encoder, folder)
    right = cached.encode([CHILD])
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    assert torch.equal(cached.encode([CHILD]), right)
    assert torch.equal(cached.encode([CHILD]), right)
    assert encoder.seen == [[CHILD], [CHILD]]
    assert torch.equal(load_embedding(path).vectors, right)


@pytest.mark.parametrize(
    "foreign",
    [SafetyEmbedding(torch.zeros(1, 37), "other-1"), SafetyEmbedding(torch.zeros(2, 37), "counting-1")],
    ids=["another encoder", "two users"],
)
def test_a_foreign_entry_is_computed_again_and_replaced(
    encoder: CountingEncoder, folder: Path, foreign: SafetyEmbedding
) -> None:
    cached = CachedEncoder(encoder, folder)
    right = cached.encode([CHILD])
    (path,) = folder.iterdir()
    save_embedding(foreign, path)
    assert torch.equal(cached.encode([CHILD]), right)
    loaded = load_embedding(path)
    assert torch.equal(loaded.vectors, right)
    assert loaded.encoder == "counting-1"


def test_entries_are_private_and_tell_nothing(encoder: CountingEncoder, folder: Path) -> None:
    secret = Profile(name=MARKER, age=87, gender=MARKER, religion=MARKER, notes=MARKER)
    CachedEncoder(encoder, folder).encode([secret])
    (path,) = folder.iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.safetensors", path.name)
    assert MARKER.encode() not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_many_profiles_have_an_entry_each(encoder: CountingEncoder, folder: Path) -> None:
    users = list({user.model_dump_json(): user for user in simulate_users(40, seed=1)}.values())
    cached = CachedEncoder(encoder, folder)
    assert torch.equal(cached.encode(users), AttributesEncoder().encode(users))
    assert torch.equal(cached.encode(users[::-1]), AttributesEncoder().encode(users[::-1]))
    assert len(list(folder.iterdir())) == len(users)
    assert len(encoder.seen) == 1


def test_without_a_cache_key_nothing_is_written(folder: Path) -> None:
    assert torch.equal(CachedEncoder(AttributesEncoder(), folder).encode([CHILD]), AttributesEncoder().encode([CHILD]))
    assert not folder.exists()


def test_reading_alone_makes_no_folder(encoder: CountingEncoder, folder: Path) -> None:
    cached = CachedEncoder(encoder, folder)
    assert cached.identity == "counting-1"
    assert cached.cache_key(CHILD) == encoder.cache_key(CHILD)
    assert not folder.exists()


def test_a_cache_without_write_permission_still_gives_the_embedding(
    open_folder: Path,
    without_root: Callable[[], AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = CountingEncoder(open_folder)
    with without_root():
        open_folder.chmod(0o500)
        vectors = CachedEncoder(encoder, open_folder / "embeddings").encode([CHILD])
    assert torch.equal(vectors, AttributesEncoder().encode([CHILD]))
    assert "cannot be written" in caplog.text


def test_a_file_in_place_of_the_cache_still_gives_the_embedding(encoder: CountingEncoder, folder: Path) -> None:
    folder.write_bytes(b"in the way")
    vectors = CachedEncoder(encoder, folder).encode([CHILD])
    assert torch.equal(vectors, AttributesEncoder().encode([CHILD]))
    assert folder.read_bytes() == b"in the way"


def test_a_full_disk_still_gives_the_embedding(
    encoder: CountingEncoder, folder: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    with full_disk():
        vectors = CachedEncoder(encoder, folder).encode([CHILD])
    assert torch.equal(vectors, AttributesEncoder().encode([CHILD]))
    assert list(folder.iterdir()) == []


def test_an_embedding_that_is_no_number_is_neither_given_nor_kept(encoder: CountingEncoder, folder: Path) -> None:
    class BrokenEncoder(CountingEncoder):
        def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
            yield torch.full((len(profiles), 37), torch.nan)

    with pytest.raises(EncoderError, match="not numbers"):
        CachedEncoder(BrokenEncoder(folder.parent / "model"), folder).encode([CHILD])
    assert list(folder.iterdir()) == []
