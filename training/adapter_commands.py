"""``psa convert``: a published adapter becomes a self-describing one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from ..adapter import AdapterError, EncoderSpec, load_adapter, save_adapter
from ..profiles import EncoderError, Profile, fill_template
from ..profiles.encoders import AttributesEncoder


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The published psa_adapter.bin or .safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    template: Annotated[
        Path | None, typer.Option(help="The prompt template; by default get_embeds.txt beside IN.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The embeddings' language model (or attributes-1); by default the published one.")
    ] = None,
) -> None:
    """Turn a published adapter into a self-describing .safetensors of half the size."""
    if target.suffix != ".safetensors":
        raise AdapterError(f"{target.name} should end in .safetensors: that is the format that is written.")
    if not target.parent.is_dir():
        raise AdapterError(f"The folder {target.parent} does not exist. Make it, or choose another one.")
    adapter = load_adapter(source)
    changes: dict[str, Any] = {}
    if encoder is not None:
        without_model = encoder == AttributesEncoder.identity
        changes |= {"name": encoder, "kind": "attributes" if without_model else "llm"}
        changes |= {"template": None} if without_model else {}
    if template is not None:
        changes["template"] = _read_template(template)
    try:
        spec = EncoderSpec.model_validate(adapter.config.encoder.model_dump() | changes)
    except ValidationError:
        raise AdapterError(
            f'"{encoder}" is not the name of a language model: expected NAME or OWNER/NAME, as on the hub.'
        ) from None
    adapter.config = adapter.config.model_copy(update={"encoder": spec})
    save_adapter(adapter, target)
    config = adapter.config
    console = Console(soft_wrap=True)
    console.print(
        f"{target}: {config.describe_base()}, embeddings of {config.embedding_dim} numbers from {config.encoder.name}, "
        f"{source.stat().st_size / 1e6:.1f} MB before, {target.stat().st_size / 1e6:.1f} MB now.",
        highlight=False,
        markup=False,
    )
    if config.encoder.kind == "llm" and config.encoder.template is None:
        console.print(
            "It has no prompt template, so it works with Load Safety Embedding only. For Encode Safety Profile "
            "convert it again with --template.",
            style="yellow",
        )


def _read_template(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"The template {path} cannot be read as UTF-8 text ({error}).") from None
    try:
        fill_template(template, Profile())
    except EncoderError as error:
        raise AdapterError(f"{path} is not a prompt template: {error}") from None
    return template
