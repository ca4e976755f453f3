"""Save and Load Compiled Profile: one person as a file that needs neither adapter nor language model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from comfy_api.latest import io

from ..adapter import (
    COMPILED_SUFFIX,
    PRECISIONS,
    AdapterError,
    Precision,
    PSAAdapter,
    compile_profile,
    load_compiled,
    save_compiled,
)
from ..profiles import bans_alone
from .encode import encode_profile
from .folders import COMPILED, check_file, file_fingerprint, file_names, find_file, missing_file, place_for
from .people import People, categories_of, effect
from .schema import Adapter, Embedding, node_schema
from .together import check_together

# One that every file system takes, and that leads nowhere else.
_FILE_NAME = re.compile(r"\w(?:[\w .+-]{0,98}[\w+-])?")


class PSACompileProfile(io.ComfyNode):
    """Writes what an adapter does for a person into a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Adapter and embedding in; a file, and what it holds, out."""
        return node_schema(
            ["PSA", "compile profile", "export profile", "save embedding", "compiled"],
            node_id="PSACompileProfile",
            display_name="Save Compiled Profile",
            description="Saves what an adapter does for one person in models/psa_compiled: a small file with which "
            "Apply PSA needs neither the adapter nor a language model. It holds no attributes, but something of them "
            "can be guessed from it: share it with the same care as a profile.",
            inputs=[
                Adapter.Input("adapter", tooltip="From Load PSA Adapter."),
                Embedding.Input(
                    "embedding", tooltip="One person, from Encode Safety Profile, or a mixture (Mix Safety Profiles)."
                ),
                io.String.Input(
                    "file_name",
                    default="my_profile",
                    tooltip="The name of the file in models/psa_compiled. It is in the workflow, and others who use "
                    "this ComfyUI see it: do not write a name that should stay private.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip="fp32 gives exactly the same pictures as adapter and embedding; fp16 is half as large.",
                ),
                io.Boolean.Input(
                    "bans_only",
                    default=False,
                    tooltip="Compile from the set of banned categories alone: then the file tells nothing else of the "
                    "person, and acts as it would for anyone who bans the same.",
                ),
                io.Boolean.Input(
                    "include_categories",
                    default=False,
                    tooltip="Write the banned categories into the file, readable for everyone who has it. Only if the "
                    "person whose profile it is agrees.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a compiled profile of this name that holds something else. Off: that is an error.",
                ),
            ],
            outputs=[
                Embedding.Output(
                    "compiled", display_name="embedding", tooltip="What the file holds, for Apply PSA without adapter."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None) -> bool | str:
        """Accept a plain name before anything is computed; a linked one is None here."""
        return file_name is None or _problem(file_name) or True

    @classmethod
    def fingerprint_inputs(cls, file_name: str | None, **_others: object) -> str:
        """Change when the file is replaced or deleted: then it is written again. ComfyUI gives all inputs."""
        return file_fingerprint(_path(file_name) if file_name and not _problem(file_name) else None)

    @classmethod
    def execute(
        cls,
        adapter: PSAAdapter,
        embedding: People,
        file_name: str,
        precision: Precision = "fp32",
        bans_only: bool = False,
        include_categories: bool = False,
        overwrite: bool = False,
    ) -> io.NodeOutput:
        """Compile, write, and read what was written."""
        if problem := _problem(file_name):
            raise AdapterError(problem)
        check_together(embedding, adapter)
        banned = categories_of(embedding)
        if banned is None and (bans_only or include_categories):
            raise AdapterError(
                "It is not known what is banned: the embedding is a mixture, or comes from a file. Switch bans_only "
                "and include_categories off, or connect Encode Safety Profile."
            )
        if banned is not None and bans_only:
            embedding = encode_profile(adapter, bans_alone(banned))
        with torch.no_grad():
            profile = compile_profile(adapter, effect(embedding, adapter), banned if include_categories else None)
        path = _path(file_name)
        save_compiled(profile, path, precision, overwrite)
        return io.NodeOutput(load_compiled(path))


class PSALoadCompiledProfile(io.ComfyNode):
    """Reads a compiled profile."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One choice: the files in models/psa_compiled."""
        return node_schema(
            ["PSA", "load compiled profile", "compiled", "without adapter"],
            node_id="PSALoadCompiledProfile",
            display_name="Load Compiled Profile",
            description="Loads a compiled profile from models/psa_compiled. Apply PSA then needs neither an adapter "
            "nor a language model; it works with models of the family that it was compiled for.",
            inputs=[
                io.Combo.Input(
                    "compiled_name",
                    options=file_names(COMPILED),
                    tooltip="A .safetensors file in models/psa_compiled, from Save Compiled Profile or psa compile.",
                )
            ],
            outputs=[
                Embedding.Output(
                    "embedding", display_name="embedding", tooltip="For Apply PSA, with nothing on its adapter input."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, compiled_name: str | None) -> bool | str:
        """Accept a file that exists; else say where it belongs."""
        return check_file("compiled profile", COMPILED, compiled_name)

    @classmethod
    def fingerprint_inputs(cls, compiled_name: str | None) -> str:
        """Change when the file is replaced."""
        return file_fingerprint(find_file(COMPILED, compiled_name) if compiled_name else None)

    @classmethod
    def execute(cls, compiled_name: str) -> io.NodeOutput:
        """Load the compiled profile."""
        path = find_file(COMPILED, compiled_name)
        if path is None:
            raise AdapterError(missing_file("compiled profile", COMPILED, compiled_name))
        return io.NodeOutput(load_compiled(path))


def _problem(file_name: str) -> str | None:
    """Return what is wrong with a file name."""
    if _FILE_NAME.fullmatch(file_name.removesuffix(COMPILED_SUFFIX)):
        return None
    return (
        "The file name of a compiled profile is letters, digits, spaces and _ . + - (at most 100), without folders. "
        "Choose another one."
    )


def _path(file_name: str) -> Path:
    return place_for(COMPILED, file_name.removesuffix(COMPILED_SUFFIX) + COMPILED_SUFFIX)


NODES: list[type[io.ComfyNode]] = [PSACompileProfile, PSALoadCompiledProfile]
