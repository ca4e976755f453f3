"""The engine diffusers: models in this process, people of any kind in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from accelerate import PartialState

from ....adapter import PSAAdapter, UserEffect, find_sites, load_adapter
from ...base.fingerprints import fingerprint
from ...dpo.inputs import Text, UNetInputs, guided_inputs
from ...errors import TrainingError
from ...miniature.pixels import to_images
from ...sampling import denoise, whole_picture
from ..config import EvaluationConfig
from ..methods import Run
from ..people import Person
from ..safe_latent import SafeLatentGuidance
from .base import Order
from .embeddings import EMBEDDINGS, Embeddings
from .models import Loaded, Models, noise


class DiffusersEngine:
    """Draws with this package's own loop, so that what users do enters as it does in training."""

    def __init__(self, config: EvaluationConfig, state: PartialState) -> None:
        """Open the base model.

        Raises:
            BaseModelError: there is none, or it is of another kind.
            TrainingError: its size is not known.
        """
        self._sampling = config.sampling
        self._device = _device(config.model.device, state)
        self._models = Models(config.model, self._device)
        self._embeddings = Embeddings(config.run.output / EMBEDDINGS, config.embeddings, state)
        self._adapters: dict[Path, PSAAdapter] = {}
        self.width, self.height = self._size(config)
        self.title = f"diffusers, {type(self._models.base.sampler()).__name__}, {config.model.precision}"

    def check(self, runs: Sequence[Run], people: Sequence[Person]) -> None:
        """Open every adapter and pipeline, and make the embeddings of all people."""
        sites = find_sites(self._models.base.empty_unet())
        for run in runs:
            self._models.check(run)
            if run.kind == "adapter" and run.path is not None:
                adapter = load_adapter(run.path)
                adapter.check_sites(sites)
                asked = {who.user: who for who in (run.who(person) for person in people) if who is not None}
                self._embeddings.prepare(adapter.config.encoder, asked.values())
                self._adapters[run.path] = adapter

    def base_of(self, run: Run) -> str:
        """Return the names of the models, and a hash of their weights."""
        return self._models.name(run)

    def adapter_of(self, run: Run) -> str | None:
        """Return the name of the adapter or the LoRA, and its hash."""
        if run.path is None or run.kind == "pipeline":
            return None
        return f"{run.path.name} {fingerprint([run.path])[:12]}"

    def person_key(self, run: Run, person: Person) -> str | None:
        """Return a hash of the embedding, if there is one."""
        who = run.who(person)
        return None if who is None else self._embeddings.key(self._adapter(run).config.encoder, who)

    def group(self, run: Run) -> object:
        """Return what the models are made of."""
        return self._models.parts(run)

    @torch.no_grad()
    def draw(self, run: Run, orders: Sequence[Order]) -> list[PIL.Image.Image]:
        """Draw a batch."""
        loaded = self._models.load(run)
        inputs = guided_inputs(
            self._effect(run, orders),
            loaded.read([order.negative_prompt for order in orders]),
            loaded.read([order.case.asked.prompt for order in orders]),
            run.strength,
        )
        text, safety = self._safe(run, loaded, inputs, len(orders))
        scale, channels = loaded.base.vae_scale_factor, loaded.base.latent_channels
        shape = (channels, self.height // scale, self.width // scale)
        start = torch.cat([noise(order.case.seed, *shape) for order in orders]).to(self._device)
        with loaded.attachment.applied(inputs.vectors, inputs.gates):
            latents = denoise(
                loaded.unet,
                loaded.base.sampler(),
                text,
                start,
                self._sampling.steps,
                self._sampling.guidance_scale,
                whole_picture(self.height, self.width, self._device) if loaded.base.is_sdxl else None,
                safety,
            )
        # One by one: the VAE of a large picture needs more memory than all that went before.
        return [to_images(loaded.coder.decode(one[None]))[0] for one in latents]

    def close(self) -> None:
        """Give the memory back."""
        self._models.unload()

    def _effect(self, run: Run, orders: Sequence[Order]) -> UserEffect | None:
        people = [who for who in (run.who(order.case.person) for order in orders) if who is not None]
        if not people:
            return None
        adapter = self._adapter(run).to(self._device)
        return adapter.effect(self._embeddings.of(adapter.config.encoder, people).to(self._device))

    def _adapter(self, run: Run) -> PSAAdapter:
        assert run.path is not None  # the configuration sees to it
        return self._adapters[run.path]

    def _safe(
        self, run: Run, loaded: Loaded, inputs: UNetInputs, pictures: int
    ) -> tuple[Text, SafeLatentGuidance | None]:
        """Return the text with the concept behind it, and the rule, if the run is Safe Latent Diffusion."""
        if run.degree is None:
            return inputs.text, None
        return inputs.text.followed_by(loaded.read([run.concept] * pictures)), SafeLatentGuidance(
            run.degree, self._sampling.steps
        )

    def _size(self, config: EvaluationConfig) -> tuple[int, int]:
        base = self._models.base
        sample = base.unet_config.get("sample_size")
        own = sample if isinstance(sample, (list, tuple)) else (sample, sample)
        height, width = (
            asked or (side and side * base.vae_scale_factor)
            for asked, side in zip((config.sampling.height, config.sampling.width), own, strict=True)
        )
        if not height or not width:
            raise TrainingError(f"{base.path} does not say how large its pictures are: set sampling.width and height.")
        if height % base.vae_scale_factor or width % base.vae_scale_factor:
            raise TrainingError(
                f"Pictures of {width} x {height} pixels are not what {base.path} can draw: choose multiples of "
                f"{base.vae_scale_factor} for sampling.width and sampling.height."
            )
        return width, height


def _device(name: str, state: PartialState) -> torch.device:
    if name == "auto":
        return state.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f'model.device = "{name}" cannot be used ({error}). Set "auto", "cpu" or "cuda".') from None
    return device
