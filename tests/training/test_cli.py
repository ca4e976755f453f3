"""The command ``psa``: profiles, simulated users, conversion, and errors in one sentence.

It is called in this process, as its program calls it; what is about the process itself starts the program.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Result, program, psa
from typer.testing import CliRunner

import comfyui_psa
from comfyui_psa.adapter import load_adapter, save_adapter
from comfyui_psa.profiles import Profile, ProfileStore, banned_categories, profiles_folder
from comfyui_psa.training.cli import app
from comfyui_psa.training.synthetic import write_release_adapter

MARKER = "Zorblax"
TEMPLATE = "A person of <<AGE>> years, ünïcode. Avoid <<BANNED>>."
PACK = Path(comfyui_psa.__file__).parent


def _assert_one_sentence(result: Result) -> str:
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines), result.stdout) == (1, 1, ""), lines[-1:]
    assert lines[0].startswith("psa: ")
    return lines[0]


def _words(result: Result) -> list[list[str]]:
    """The cells of all table rows that were printed."""
    assert result.returncode == 0, result.stderr.splitlines()[-1:]
    rows = [re.split("[│┃|]", line)[1:-1] for line in result.stdout.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if row]


@pytest.fixture
def user_directory(tmp_path: Path) -> Path:
    return tmp_path / "user"


@pytest.fixture
def store(user_directory: Path) -> ProfileStore:
    return ProfileStore(profiles_folder(user_directory))


@pytest.fixture
def run(user_directory: Path) -> Callable[..., Result]:
    """Run ``psa profile`` on the store."""
    return lambda *args, **kwargs: psa("profile", *args, "--user-directory", user_directory, **kwargs)


def test_a_profile_is_made_from_options(run: Callable[..., Result], store: ProfileStore) -> None:
    result = run(
        "new", "--name", "evening", "--age", "35", "--gender", "female", "--religion", "my own", "--notes", "[b]mine",
        "--physical-condition", "healthy", "--mental-condition", "anxiety", "--ban", "Hate", "--ban", "Shocking",
        "--allow", "Violence", "--activate",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    stored = store.resolve("active")
    assert result.stdout == f"{stored.id} (active)\n"
    assert stored.profile == Profile(
        name="evening",
        age=35,
        gender="female",
        religion="my own",
        physical_condition="healthy",
        mental_condition="anxiety",
        overrides={"Hate": "ban", "Shocking": "ban", "Violence": "allow"},
        notes="[b]mine",
    )


def test_a_profile_is_made_from_a_level(run: Callable[..., Result], store: ProfileStore) -> None:
    result = run("new", "--level", "L3", "--name", "mine", "--age", "40", "--allow", "Shocking")
    assert result.returncode == 0, result.stderr
    profile = store.read(result.stdout.strip()).profile
    assert (profile.name, profile.age, profile.religion) == ("mine", 40, "Christianity")
    assert set(banned_categories(profile)) == {"Propaganda", "Self-Harm", "Sexuality"}
    assert store.active_id() is None


def test_without_options_the_program_asks(user_directory: Path, store: ProfileStore) -> None:
    answers = "evening\n41\n\nIslam\n\nwar\nShocking, Harassment\nViolence\n"
    result = program("profile", "new", "--user-directory", user_directory, answers=answers)
    assert result.returncode == 0, result.stderr
    (entry,) = store.entries()
    assert store.read(entry.id).profile == Profile(
        name="evening",
        age=41,
        religion="Islam",
        mental_condition="war",
        overrides={"Shocking": "ban", "Harassment": "ban", "Violence": "allow"},
    )


def test_every_answer_may_stay_empty(run: Callable[..., Result], store: ProfileStore) -> None:
    assert run("new", answers="\n" * 8).returncode == 0
    (entry,) = store.entries()
    assert store.read(entry.id).profile == Profile()


def test_an_interrupted_conversation_makes_nothing(run: Callable[..., Result], store: ProfileStore) -> None:
    assert run("new", answers="evening\n41\n").returncode == 1
    assert store.entries() == ()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--age", MARKER), "whole number from 0 to 130"),
        (("--age", "-1234567"), "whole number from 0 to 130"),
        (("--ban", MARKER), "ban, allow or rule"),
    ],
)
def test_a_wrong_option_is_one_sentence_without_the_value(
    run: Callable[..., Result], store: ProfileStore, options: tuple[str, str], expected: str
) -> None:
    message = _assert_one_sentence(run("new", *options))
    assert expected in message
    assert options[1] not in message
    assert store.entries() == ()


def test_the_list_shows_id_name_and_the_active_one_but_no_attribute(
    run: Callable[..., Result], store: ProfileStore
) -> None:
    first = store.create(Profile(name="evening", religion=MARKER))
    second = store.create(Profile(name="kids", religion=MARKER))
    store.activate(second.id)
    result = run("list")
    assert [first.id, "evening", ""] in _words(result)
    assert [second.id, "kids", "active"] in _words(result)
    assert MARKER not in result.stdout


def test_the_list_survives_a_damaged_profile(run: Callable[..., Result], store: ProfileStore) -> None:
    healthy, damaged = store.create(Profile(name="evening")), store.create(Profile())
    path = store.root / f"{damaged.id}.json"
    path.write_text('{"format": "psa_profile", "format_version": 1, "profile": {"age": "Zorblax"}}', encoding="utf-8")
    result = run("list")
    assert [healthy.id, "evening", ""] in _words(result)
    assert "unreadable" in result.stdout
    assert path.name in result.stdout
    assert MARKER not in result.stdout


def test_the_list_shows_names_as_they_are(run: Callable[..., Result], store: ProfileStore) -> None:
    names = {store.create(Profile(name=name)).id: name for name in ("[draft] kids", "[/]", ":smile:")}
    words = _words(run("list"))
    assert all([profile_id, name, ""] in words for profile_id, name in names.items())


def test_show_tells_attributes_and_decisions(run: Callable[..., Result], store: ProfileStore) -> None:
    stored = store.create(Profile(name="evening", age=17, religion="Islam", overrides={"Violence": "allow"}))
    store.activate(stored.id)
    words = _words(run("show", "active"))
    assert ["age", "17"] in words
    assert ["gender", "not said"] in words
    assert ["Violence", "allowed", "your own choice"] in words
    assert ["Sexuality", "banned", "under 18"] in words
    assert ["Shocking", "allowed", ""] in words


def test_show_tells_values_as_they_are(run: Callable[..., Result], store: ProfileStore) -> None:
    stored = store.create(Profile(name="a", religion="[red]mine", gender="[/closing]", notes="[x]"))
    words = _words(run("show", stored.id))
    assert ["religion", "[red]mine"] in words
    assert ["gender", "[/closing]"] in words
    assert ["notes", "[x]"] in words


def test_an_unknown_id_is_one_sentence(run: Callable[..., Result]) -> None:
    assert "psa profile list" in _assert_one_sentence(run("show", "0123456789abcdef"))


def test_accounts_have_stores_of_their_own(run: Callable[..., Result], user_directory: Path) -> None:
    names = {"Alice_1": "Alice", "Bob_2": "Bob", "Bob_3": "Bob"}
    user_directory.mkdir(exist_ok=True)
    (user_directory / "users.json").write_text(json.dumps(names), encoding="utf-8")
    made = run("new", "--name", "hers", "--account", "Alice").stdout.strip()
    assert ProfileStore(profiles_folder(user_directory, "Alice_1")).read(made).profile.name == "hers"
    assert made in run("list", "--account", "Alice_1").stdout
    assert made not in run("list").stdout
    assert made not in run("list", "--account", "Bob_2").stdout
    assert 'more than one account "Bob"' in _assert_one_sentence(run("list", "--account", "Bob"))
    assert 'no account "Carol"' in _assert_one_sentence(run("list", "--account", "Carol"))


def test_an_account_where_there_are_none_is_said_so(run: Callable[..., Result]) -> None:
    assert "Leave out --account" in _assert_one_sentence(run("list", "--account", "Alice"))


def test_activate_changes_the_active_profile(run: Callable[..., Result], store: ProfileStore) -> None:
    first, second = store.create(Profile()), store.create(Profile(age=5))
    store.activate(first.id)
    assert run("activate", second.id).returncode == 0
    assert store.resolve("active") == second


def test_delete_with_yes_deletes(run: Callable[..., Result], store: ProfileStore) -> None:
    kept, deleted = store.create(Profile()), store.create(Profile())
    assert run("delete", deleted.id, "--yes").returncode == 0
    assert [entry.id for entry in store.entries()] == [kept.id]


@pytest.mark.parametrize(("answer", "left"), [("\n", 1), ("y\n", 0)])
def test_delete_asks_first(run: Callable[..., Result], store: ProfileStore, answer: str, left: int) -> None:
    stored = store.create(Profile())
    run("delete", stored.id, answers=answer)
    assert len(store.entries()) == left


def test_schema_prints_the_json_schema() -> None:
    assert json.loads(psa("profile", "schema").stdout) == Profile.model_json_schema()


def test_the_user_folder_may_come_from_the_environment(user_directory: Path, store: ProfileStore) -> None:
    stored = store.create(Profile(name="evening"))
    assert [stored.id, "evening", ""] in _words(psa("profile", "list", PSA_USER_DIRECTORY=str(user_directory)))


def _link_pack(folder: Path) -> dict[str, str]:
    """Link the pack into a folder; return the environment in which the program runs from there."""
    folder.mkdir(parents=True)
    (folder / "comfyui_psa").symlink_to(PACK, target_is_directory=True)
    return {"PYTHONPATH": str(folder)}


def test_a_pack_in_custom_nodes_finds_the_user_folder_of_its_comfyui(tmp_path: Path) -> None:
    environment = _link_pack(tmp_path / "ComfyUI" / "custom_nodes")
    result = program("profile", "new", "--name", "evening", **environment)
    assert result.returncode == 0, result.stderr
    (entry,) = ProfileStore(profiles_folder(tmp_path / "ComfyUI" / "user")).entries()
    assert entry.name == "evening"


def test_a_pack_elsewhere_asks_for_the_user_folder(tmp_path: Path) -> None:
    message = _assert_one_sentence(program("profile", "list", **_link_pack(tmp_path / "elsewhere")))
    assert "--user-directory" in message
    assert "PSA_USER_DIRECTORY" in message


def test_a_user_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    message = _assert_one_sentence(psa("profile", "new", "--age", "5", "--user-directory", tmp_path / "file"))
    assert "cannot be written" in message


def test_users_are_csv_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    shown = psa("users", "--n", 5, "--seed", 2025)
    assert psa("users", "--n", 5, "--output", tmp_path / "users.csv", "--seed", 2025).stdout == ""
    assert (tmp_path / "users.csv").read_text(encoding="utf-8") == shown.stdout
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    assert [row["User_ID"] for row in rows] == ["0000001", "0000002", "0000003", "0000004", "0000005"]
    assert all(row["Banned_Categories"].startswith("[") for row in rows)


def test_users_into_a_missing_folder_are_one_sentence(tmp_path: Path) -> None:
    _assert_one_sentence(psa("users", "--n", 1, "--output", tmp_path / "missing" / "users.csv"))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    path = tmp_path / "psa_adapter.bin"
    write_release_adapter(path, hidden_sizes=(64, 64, 128), cross_attention_dim=48, embedding_dim=96)
    return path


def test_convert_keeps_the_adapter_and_halves_the_file(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.safetensors"
    result = psa("convert", release, target)
    assert result.returncode == 0, result.stderr
    before, after = load_adapter(release), load_adapter(target)
    assert after.config == before.config
    assert {name: tensor.tolist() for name, tensor in after.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.state_dict().items()
    }
    assert target.stat().st_size < 0.6 * release.stat().st_size
    assert "--template" in result.stdout


def test_convert_takes_the_template_beside_the_release(release: Path, tmp_path: Path) -> None:
    release.with_name("get_embeds.txt").write_text(TEMPLATE, encoding="utf-8")
    target = tmp_path / "adapter.safetensors"
    assert "--template" not in psa("convert", release, target).stdout
    encoder = load_adapter(target).config.encoder
    assert (encoder.kind, encoder.name, encoder.template) == ("llm", "Qwen/Qwen2.5-7B-Instruct", TEMPLATE)


def test_the_options_of_convert_win(release: Path, tmp_path: Path) -> None:
    release.with_name("get_embeds.txt").write_text("beside <<AGE>>", encoding="utf-8")
    (tmp_path / "mine.txt").write_text(TEMPLATE, encoding="utf-8")
    target = tmp_path / "adapter.safetensors"
    result = psa("convert", release, target, "--template", tmp_path / "mine.txt", "--encoder", "someone/else")
    assert result.returncode == 0, result.stderr
    encoder = load_adapter(target).config.encoder
    assert (encoder.name, encoder.template) == ("someone/else", TEMPLATE)


def _folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize("damage", ["cut off", "infinity"])
def test_a_failing_conversion_leaves_an_existing_target(release: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "adapter.safetensors"
    save_adapter(load_adapter(release), target)
    if damage == "cut off":
        os.truncate(release, release.stat().st_size // 2)
    else:
        content = torch.load(release, weights_only=True)
        content["user_proj"]["proj.bias"][0] = torch.inf
        torch.save(content, release)
    before = _folder(target.parent)
    assert release.name in _assert_one_sentence(psa("convert", release, target))
    assert _folder(target.parent) == before


def test_a_disk_that_fills_up_leaves_an_existing_target(release: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "adapter.safetensors"
    save_adapter(load_adapter(release), target)
    before = _folder(target.parent)
    result = program("convert", release, target, full_disk=True)
    assert result.returncode == 1
    assert _folder(target.parent) == before
    _assert_one_sentence(result)


def test_a_target_that_is_a_folder_is_one_sentence(release: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    before = _folder(tmp_path)
    result = psa("convert", release, tmp_path / "folder.safetensors")
    assert _folder(tmp_path) == before
    _assert_one_sentence(result)


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("out.bin", (), "should end in .safetensors"),
        ("missing/out.safetensors", (), "does not exist"),
        ("out.safetensors", ("--template", "missing.txt"), "missing.txt"),
    ],
)
def test_a_wrong_path_for_convert_is_one_sentence(
    release: Path, tmp_path: Path, target: str, options: tuple[str, ...], expected: str
) -> None:
    before = _folder(tmp_path)
    message = _assert_one_sentence(psa("convert", release, tmp_path / target, *options))
    assert expected in message
    assert _folder(tmp_path) == before


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "users",
        "convert",
        "profile",
        *(f"profile {name}" for name in ("new", "list", "show", "delete", "activate", "schema")),
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Usage: \S+ {command}", re.sub(r"\x1b\[[0-9;]*m", "", result.stdout))
