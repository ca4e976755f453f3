"""``psa compile``: what an adapter does for one person, as a file that needs neither adapter nor language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..adapter import (
    COMPILED_SUFFIX,
    PRECISIONS,
    AdapterError,
    Precision,
    compile_profile,
    load_adapter,
    load_compiled,
    save_compiled,
)
from ..profiles import Profile, ProfileError, banned_categories, bans_alone, find_level, levels
from ..profiles.files import parse_file
from .data.users import encoder_of
from .profile_commands import Account, UserDirectory, profile_store


def compile_command(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter file.")],
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help='An id of `psa profile list`, "active", a level (L0 to L5), or an exported file.'
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    models: Annotated[
        list[Path] | None, typer.Option(help="Where language models lie, if the adapter names one (repeatable).")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 (exact) or fp16 (half as large).")] = "fp32",
    bans_only: Annotated[
        bool,
        typer.Option(
            "--bans-only", help="Compile from the set of banned categories alone, as if the profile said nothing else."
        ),
    ] = False,
    include_categories: Annotated[
        bool,
        typer.Option("--include-categories", help="Write the banned categories into the file: only if they agree."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compiled profile of this name.")] = False,
    user_directory: UserDirectory = None,
    account: Account = None,
) -> None:
    """Compile a profile: a small file with which Apply PSA needs neither adapter nor language model."""
    if output.suffix != COMPILED_SUFFIX:
        raise AdapterError(f"{output.name} should end in {COMPILED_SUFFIX}: that is the format that is written.")
    kept_in = _precision(precision)
    if not output.parent.is_dir():
        raise AdapterError(f"The folder {output.parent} does not exist. Make it, or choose another one.")
    person = _profile(profile, user_directory, account)
    banned = banned_categories(person)
    loaded = load_adapter(adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder_of(loaded.config.encoder, models or [], device)
    with torch.no_grad():
        vectors = encoder.encode([bans_alone(banned) if bans_only else person])
        compiled = compile_profile(loaded, loaded.effect(vectors), banned if include_categories else None)
    save_compiled(compiled, output, kept_in, overwrite)
    spec = load_compiled(output).spec
    console = Console(soft_wrap=True)
    console.print(
        f"{output}: {output.stat().st_size / 1000:.0f} KB, for {spec.describe_base()}; "
        f"{'names the banned categories' if spec.categories is not None else 'names no categories'}. Put it into "
        "ComfyUI's models/psa_compiled.",
        highlight=False,
        markup=False,
    )


def _precision(value: str) -> Precision:
    for known in PRECISIONS:
        if value == known:
            return known
    raise AdapterError(f'There is no precision "{value}": expected fp32 or fp16.')


def _profile(reference: str, user_directory: Path | None, account: str | None) -> Profile:
    if any(reference == level.id for level in levels()):
        return find_level(reference).profile
    path = Path(reference)
    if path.suffix == ".json":
        return _exported(path)
    return profile_store(user_directory, account).resolve(reference).profile


def _exported(path: Path) -> Profile:
    try:
        return parse_file(path.read_text(encoding="utf-8"), path)[1]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The profile file {path} cannot be read ({error}). Name an exported profile.") from None
