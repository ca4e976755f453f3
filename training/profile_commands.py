"""``psa profile`` and ``psa users``: the private store and simulated users from the command line."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..profiles import (
    ACTIVE,
    CATEGORIES,
    Profile,
    ProfileError,
    ProfileStore,
    banned_categories,
    decide,
    find_level,
    parse_profile,
    profiles_folder,
    simulate_users,
    user_row,
)
from ..profiles.schema import GENDERS, MENTAL_CONDITIONS, PHYSICAL_CONDITIONS, RELIGIONS
from ..safe_files import replacing

USER_DIRECTORY = "PSA_USER_DIRECTORY"

profile_app = typer.Typer(help="Your profiles, in the private folder of your ComfyUI.", no_args_is_help=True)


def _console() -> Console:
    """As wide as the terminal is now."""
    return Console(soft_wrap=True, highlight=False)


UserDirectory = Annotated[
    Path | None,
    typer.Option(
        help="ComfyUI's user folder; not needed if this pack lies in ComfyUI's custom_nodes.", envvar=USER_DIRECTORY
    ),
]
Account = Annotated[str | None, typer.Option(help="Whose, where ComfyUI has accounts (--multi-user): a name or an id.")]
ProfileId = Annotated[str, typer.Argument(metavar="ID", help="The profile's id, as in `psa profile list`.")]


@profile_app.command()
def new(
    name: Annotated[str | None, typer.Option(help="What you call the profile.")] = None,
    age: Annotated[str | None, typer.Option(help="Years, 0 to 130.")] = None,
    gender: Annotated[str | None, typer.Option(help=f"{', '.join(GENDERS)}, or free text.")] = None,
    religion: Annotated[str | None, typer.Option(help=f"{', '.join(RELIGIONS)}, or free text.")] = None,
    physical_condition: Annotated[
        str | None, typer.Option(help=f"{', '.join(PHYSICAL_CONDITIONS)}, or free text.")
    ] = None,
    mental_condition: Annotated[str | None, typer.Option(help=f"{', '.join(MENTAL_CONDITIONS)}, or free text.")] = None,
    ban: Annotated[list[str] | None, typer.Option(help="Ban a category whatever the rules say (repeatable).")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Allow a category likewise (repeatable).")] = None,
    notes: Annotated[str | None, typer.Option(help="For yourself; used nowhere.")] = None,
    level: Annotated[str | None, typer.Option(help="Start from a safety level, L0 to L5.")] = None,
    activate: Annotated[bool, typer.Option("--activate", help="Make it the active profile.")] = False,
    user_directory: UserDirectory = None,
    account: Account = None,
) -> None:
    """Make a profile. Without options it asks, so that your shell's history remembers nothing."""
    store = profile_store(user_directory, account)
    fields: dict[str, Any] = find_level(level).profile.model_dump() if level else {}
    given = {
        "name": name,
        "age": age,
        "gender": gender,
        "religion": religion,
        "physical_condition": physical_condition,
        "mental_condition": mental_condition,
        "notes": notes,
    }
    if level is None and not ban and not allow and all(value is None for value in given.values()):
        given, ban, allow = _ask()
    fields |= {field: value for field, value in given.items() if value not in (None, "")}
    if both := set(ban or []) & set(allow or []):
        raise ProfileError(f"{', '.join(sorted(both))} cannot be banned and allowed at once.")
    fields["overrides"] = fields.get("overrides", {}) | _overrides(ban, "ban") | _overrides(allow, "allow")
    if isinstance(fields.get("age"), str) and fields["age"].strip().isdecimal():
        fields["age"] = int(fields["age"])
    stored = store.create(parse_profile(fields, "The new profile"))
    if activate:
        store.activate(stored.id)
    _console().print(f"{stored.id}{' (active)' if activate else ''}", markup=False)
    # On stderr: stdout is the id alone, for scripts.
    bans = ", ".join(banned_categories(stored.profile)) or "nothing"
    Console(stderr=True, highlight=False).print(f"This profile bans {bans}.")


@profile_app.command("list")
def list_profiles(user_directory: UserDirectory = None, account: Account = None) -> None:
    """List your profiles: id, name, and which one is active."""
    table = Table("id", "name", "active")
    for entry in profile_store(user_directory, account).entries():
        name = Text(f"unreadable: {entry.problem}", "red") if entry.problem else Text(entry.name)
        table.add_row(entry.id, name, "active" if entry.active else "")
    _console().print(table)


@profile_app.command()
def show(profile_id: ProfileId, user_directory: UserDirectory = None, account: Account = None) -> None:
    """Show one profile, and which category it bans for which reason."""
    profile = profile_store(user_directory, account).resolve(profile_id).profile
    attributes = Table("attribute", "value")
    for field, value in profile.model_dump(exclude={"overrides"}).items():
        # As Text: what people write is not markup.
        attributes.add_row(field.replace("_", " "), Text("not said" if value in (None, "") else str(value)))
    bans = Table("category", "decision", "why")
    for category, decision in decide(profile).items():
        bans.add_row(category, "banned" if decision.banned else "allowed", ", ".join(decision.reasons))
    _console().print(attributes, bans)


@profile_app.command()
def delete(
    profile_id: ProfileId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    user_directory: UserDirectory = None,
    account: Account = None,
) -> None:
    """Delete a profile for good."""
    store = profile_store(user_directory, account)
    if profile_id == ACTIVE:
        profile_id = store.resolve(ACTIVE).id
    if not yes:
        typer.confirm(f"Delete profile {profile_id} for good?", abort=True)
    store.delete(profile_id)


@profile_app.command()
def restore(profile_id: ProfileId, user_directory: UserDirectory = None, account: Account = None) -> None:
    """Bring back the version of a profile before its last save. A damaged file is set aside."""
    profile_store(user_directory, account).restore(profile_id)


@profile_app.command()
def activate(profile_id: ProfileId, user_directory: UserDirectory = None, account: Account = None) -> None:
    """Make a profile the active one, which "active" in a workflow refers to."""
    profile_store(user_directory, account).activate(profile_id)


@profile_app.command()
def schema() -> None:
    """Print the JSON schema of a profile."""
    _console().print_json(json.dumps(Profile.model_json_schema()))


def users(
    n: Annotated[int, typer.Option("--n", min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same users.")] = 2025,
    output: Annotated[Path | None, typer.Option(help="A CSV file; by default the terminal.")] = None,
) -> None:
    """Simulate users with the published distribution, as the release's users.csv, banned by the rules."""
    rows = [user_row(number, user) for number, user in enumerate(simulate_users(n, seed), start=1)]
    if output is None:
        _write_csv(sys.stdout, rows)
        return
    try:
        with replacing(output) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            _write_csv(file, rows)
    except OSError as error:
        raise ProfileError(f"{output} cannot be written ({error.strerror}). Choose another file.") from None


def _write_csv(file: TextIO, rows: Sequence[dict[str, str]]) -> None:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _ask() -> tuple[dict[str, str | None], list[str], list[str]]:
    _console().print("Every answer may stay empty: then nothing follows from it.")
    own_words = "or your own words"
    questions = {
        "name": "What do you call this profile",
        "age": "Age",
        "gender": f"Gender ({', '.join(GENDERS)}, {own_words})",
        "religion": f"Religion ({', '.join(RELIGIONS)}, {own_words})",
        "physical_condition": f"Physical condition ({', '.join(PHYSICAL_CONDITIONS)}, {own_words})",
        "mental_condition": f"Mental condition ({', '.join(MENTAL_CONDITIONS)}, {own_words})",
    }
    answers: dict[str, str | None] = {field: _answer(question) for field, question in questions.items()}
    _console().print(f"The categories are {', '.join(CATEGORIES)}.")
    ban, allow = (_answer(f"{word} in any case (separated by commas)").split(",") for word in ("Ban", "Allow"))
    return answers, [word.strip() for word in ban if word.strip()], [word.strip() for word in allow if word.strip()]


def _answer(question: str) -> str:
    return str(typer.prompt(question, default="", show_default=False))


def _overrides(categories: list[str] | None, override: str) -> dict[str, str]:
    return dict.fromkeys(categories or [], override)


def profile_store(user_directory: Path | None, account: str | None) -> ProfileStore:
    """Return the private store of a ComfyUI; by default of the one in which this pack lies.

    Raises:
        ProfileError: it is not clear where it is, or whose.
    """
    if user_directory is None:
        # Not resolved: a pack that is linked into custom_nodes belongs to the ComfyUI that links it.
        pack = Path(os.path.abspath(__file__)).parents[1]  # noqa: PTH100
        if pack.parent.name != "custom_nodes":
            raise ProfileError(
                "It is not clear where your ComfyUI lies. Name its user folder: "
                f"--user-directory PATH/TO/ComfyUI/user, or the environment variable {USER_DIRECTORY}."
            )
        user_directory = pack.parents[1] / "user"
    if not user_directory.absolute().parent.is_dir():
        raise ProfileError(f"There is no ComfyUI around {user_directory}: its folder does not exist.")
    return ProfileStore(profiles_folder(user_directory, account and _account_id(user_directory, account)))


def _account_id(user_directory: Path, account: str) -> str:
    """Return the id of an account, which ComfyUI keeps with its name in ``users.json``."""
    path = user_directory / "users.json"
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"{path} cannot be read ({error}): there ComfyUI keeps its accounts. Leave out --account if it has none."
        ) from None
    found = [known for known, name in names.items() if account in (known, name)]
    if len(found) != 1:
        count = "no account" if not found else "more than one account"
        raise ProfileError(f'This ComfyUI has {count} "{account}". In {path} are their ids: {", ".join(names)}.')
    return found[0]
