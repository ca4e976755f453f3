"""The engine comfyui: a ComfyUI that runs somewhere with this pack, asked over its API for one picture at a time.

Its KSampler draws the noise of a seed as the engine diffusers does. Models and adapters are ComfyUI's own files, by
the names that it lists; pictures pass through its folder of temporary files. People other than levels are put into its
private store for as long as the evaluation draws.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL.Image
import requests
import websocket

from ....safe_files import DAMAGE
from ...comfyui import ComfyUIClient, Prompt
from ...errors import ComfyUIError, TrainingError
from ...miniature import MINIATURE
from ...miniature.architecture import LATENT_SIZE
from ..config import EvaluationConfig
from ..methods import Run
from ..people import Person
from .base import Order

_NODES = ("PSALoadAdapter", "PSAUserProfile", "PSAEncodeProfile", "PSAApply")
_TRIAL_SIZE = 64
_MINIATURE_SIZE = 8 * LATENT_SIZE


class ComfyUIEngine:
    """Draws over HTTP."""

    def __init__(self, config: EvaluationConfig) -> None:
        """Ask the server what it has.

        Raises:
            ComfyUIError: nothing answers, or this pack is not there.
            TrainingError: the size of pictures is not stated.
        """
        self._config = config
        self._client = ComfyUIClient(config.engine.address)
        if not self._client.answers():
            raise ComfyUIError(
                f"No ComfyUI answers at engine.address = {self._client.url}. Start it, or correct the address."
            )
        with _talking():
            self._nodes: Mapping[str, Any] = self._client.get("/object_info")
        lacking = [node for node in _NODES if node not in self._nodes]
        if lacking:
            raise ComfyUIError(
                f"The ComfyUI at {self._client.url} has no node {lacking[0]}. Install ComfyUI-PSA there, in this "
                "version."
            )
        self._miniature = config.model.base.name == MINIATURE.name
        if not self._miniature and not (config.sampling.width and config.sampling.height):
            raise TrainingError("ComfyUI does not say how large pictures are: set sampling.width and sampling.height.")
        self.width = config.sampling.width or _MINIATURE_SIZE
        self.height = config.sampling.height or _MINIATURE_SIZE
        self.title = f"comfyui, {config.engine.sampler}, {config.engine.scheduler}"
        self._profiles: dict[str, str] = {}

    def check(self, runs: Sequence[Run], people: Sequence[Person]) -> None:
        """Look for every file in ComfyUI's lists, and draw one step with each, which shows whether it fits."""
        self._listed("KSampler", "sampler_name", Path(self._config.engine.sampler))
        self._listed("KSampler", "scheduler", Path(self._config.engine.scheduler))
        tried: set[Path | None] = set()
        for run in runs:
            if run.path in tried:
                continue
            tried.add(run.path)
            person = run.who(people[0]) or people[0]
            prompt = self._prompt(run, person, "", "", seed=0)
            prompt["sampler"]["inputs"]["steps"] = 1
            prompt["size"]["inputs"].update(width=_TRIAL_SIZE, height=_TRIAL_SIZE)
            self._run(prompt)

    def base_of(self, run: Run) -> str:
        """Return the name of the checkpoint; ComfyUI tells no hash."""
        return f"{self._checkpoint(run) or MINIATURE.name} in ComfyUI"

    def adapter_of(self, run: Run) -> str | None:
        """Return the name of the adapter or the LoRA; ComfyUI tells no hash."""
        if run.path is None or run.kind == "pipeline":
            return None
        node, name = ("LoraLoader", "lora_name") if run.kind == "lora" else ("PSALoadAdapter", "adapter_name")
        return f"{self._listed(node, name, run.path)} in ComfyUI"

    def person_key(self, run: Run, person: Person) -> str | None:
        """Return a hash of what ComfyUI is told of a person, if it is told something."""
        who = run.who(person)
        return None if who is None else sha256(_told(who).encode()).hexdigest()[:16]

    def group(self, run: Run) -> object:
        """Return the files that ComfyUI has to load."""
        return self.base_of(run), self.adapter_of(run)

    def draw(self, run: Run, orders: Sequence[Order]) -> list[PIL.Image.Image]:
        """Draw one after the other."""
        return [
            self._run(
                self._prompt(
                    run,
                    run.who(order.case.person),
                    order.case.asked.prompt,
                    order.negative_prompt,
                    order.case.seed,
                )
            )
            for order in orders
        ]

    def close(self) -> None:
        """Take people out of ComfyUI's store again."""
        while self._profiles:
            _, profile = self._profiles.popitem()
            with _talking():
                self._client.delete(f"/psa/profiles/{profile}")

    def _prompt(self, run: Run, person: Person | None, positive: str, negative: str, seed: int) -> Prompt:
        """Return the workflow, in the API's format."""
        sampling, engine = self._config.sampling, self._config.engine
        checkpoint = self._checkpoint(run)
        loader = {"class_type": "PSALoadMiniature", "inputs": {}}
        if checkpoint is not None:
            loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
        prompt: Prompt = {"model": loader}
        model, clip = ["model", 0], ["model", 1]
        if run.kind == "lora" and run.path is not None:
            inputs = {"model": model, "clip": clip, "strength_model": run.strength, "strength_clip": run.strength}
            inputs["lora_name"] = self._listed("LoraLoader", "lora_name", run.path)
            prompt["lora"] = {"class_type": "LoraLoader", "inputs": inputs}
            model, clip = ["lora", 0], ["lora", 1]
        if run.kind == "adapter" and run.path is not None and person is not None:
            prompt |= self._persons(run, run.path, person, model)
            model = ["psa", 0]
        for name, text in (("positive", positive), ("negative", negative)):
            prompt[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": text}}
        size = {"width": self.width, "height": self.height, "batch_size": 1}
        prompt["size"] = {"class_type": "EmptyLatentImage", "inputs": size}
        settings: dict[str, Any] = {"seed": seed, "steps": sampling.steps, "cfg": sampling.guidance_scale}
        settings |= {"sampler_name": engine.sampler, "scheduler": engine.scheduler, "denoise": 1.0, "model": model}
        settings |= {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["size", 0]}
        prompt["sampler"] = {"class_type": "KSampler", "inputs": settings}
        decode = {"samples": ["sampler", 0], "vae": ["model", 2]}
        prompt["decode"] = {"class_type": "VAEDecode", "inputs": decode}
        prompt["image"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
        return prompt

    def _persons(self, run: Run, path: Path, person: Person, model: list[Any]) -> Prompt:
        adapter = {"adapter_name": self._listed("PSALoadAdapter", "adapter_name", path)}
        strength = {"strength": run.strength, "start_percent": 0.0, "end_percent": 1.0}
        inputs = {"model": model, "adapter": ["adapter", 0], "embedding": ["embedding", 0], **strength}
        encode = {"adapter": ["adapter", 0], "profile": ["person", 0]}
        return {
            "adapter": {"class_type": "PSALoadAdapter", "inputs": adapter},
            "person": {"class_type": "PSAUserProfile", "inputs": {"profile_id": self._reference(person)}},
            "embedding": {"class_type": "PSAEncodeProfile", "inputs": encode},
            "psa": {"class_type": "PSAApply", "inputs": inputs},
        }

    def _reference(self, person: Person) -> str:
        if person.level is not None:
            return person.level
        told = _told(person)
        if told not in self._profiles:
            profile = person.profile.model_dump(exclude={"name", "notes"}) | {"name": f"evaluation: {person.user}"}
            with _talking():
                self._profiles[told] = self._client.post("/psa/profiles", {"profile": profile})["id"]
        return self._profiles[told]

    def _checkpoint(self, run: Run) -> str | None:
        """Return the checkpoint of a run as ComfyUI names it; None for the miniature."""
        if run.kind == "pipeline" and run.path is not None:
            return self._listed("CheckpointLoaderSimple", "ckpt_name", run.path)
        if self._miniature:
            return None
        return self._listed("CheckpointLoaderSimple", "ckpt_name", self._config.model.base)

    def _listed(self, node: str, name: str, path: Path) -> str:
        """Return the file of a path as ComfyUI's node lists it, with its folders or without."""
        kind, *options = self._nodes[node]["input"]["required"][name]
        choices = kind if isinstance(kind, list) else options[0]["options"]
        for candidate in (path.as_posix(), str(path), path.name):
            if candidate in choices:
                return candidate
        known = ", ".join(map(str, choices[:10])) or "none"
        raise ComfyUIError(
            f'The ComfyUI at {self._client.url} lists no {name} "{path}"; it has {known}'
            f"{', ...' if len(choices) > 10 else ''}. Put the file into its folder and restart it, or correct the name."
        )

    def _run(self, prompt: Prompt) -> PIL.Image.Image:
        with _talking():
            (image,) = self._client.run(prompt)
            return PIL.Image.open(io.BytesIO(image.content)).convert("RGB")


def _told(person: Person) -> str:
    return person.level or person.profile.model_dump_json(exclude={"name", "notes"})


@contextmanager
def _talking() -> Iterator[None]:
    """Within the block, a connection that breaks is an error that says how to go on."""
    try:
        yield
    except ComfyUIError:
        raise
    except (requests.RequestException, websocket.WebSocketException, *DAMAGE) as error:
        raise ComfyUIError(
            f"The ComfyUI stopped answering ({error}). Look at its log and start it again; what is drawn stays, and "
            "the same command goes on."
        ) from None
