"""The patch on a ComfyUI model: a user's vectors, added behind ``to_out`` of every cross-attention layer.

The vectors of an adapter stand in front of ``to_out``. They are projected with the model's own layers when
sampling begins, in whatever state those are then (LoRA, fp8, offloaded), and live for that run only:

    to_out(a + v) = to_out(a) + (to_out(v) - to_out(0))

A wrapper around ``apply_model`` works out once per call of the UNet what each image gets; an
``attn2_output_patch`` then adds one prepared tensor per layer. Nothing is kept on shared objects: the state
of a run travels in its ``transformer_options``.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..adapter import AdapterError, BlockKey, Site, SiteVectors

CONDITIONAL = 0
COUPLE_KEY = "cond_or_uncond_couple"  # left by Attention Couple, which repeats conditional chunks

# Values are scaled up to this size (by a power of two, so exactly) while a layer projects them: then its
# bias, which cancels out, costs no precision in half floats.
_PROJECTION_PEAK = 64.0

Options = dict[str, Any]


class UserPatch:
    """The users' vectors for one model, with strength and range; immutable, so clones may share it.

    Batches: one user serves every image; N users need N images per chunk, one for each.
    """

    def __init__(
        self,
        vectors: SiteVectors,
        sites: Sequence[Site],
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> None:
        """Take ``vectors`` for ``sites`` (same order); act from ``start_percent`` to before ``end_percent``."""
        self.users = vectors.user[0].shape[0]
        self.strength = strength
        self.start_percent = start_percent
        self.end_percent = end_percent
        self.sites = tuple(sites)
        self.index = {site.key: i for i, site in enumerate(sites)}
        # Per site [users + 1, hidden]: the users, then what the unconditional half adds.
        self.rows = tuple(
            torch.cat([user, (torch.zeros_like(user[0]) if vectors.null is None else vectors.null[i])[None]])
            for i, user in enumerate(vectors.user)
        )
        self._key = f"psa_{uuid.uuid4().hex}"

    def __deepcopy__(self, memo: dict[int, object]) -> UserPatch:
        """Return itself: ComfyUI copies patches with every clone of a model."""
        return self

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """Return a clone of ``model`` with this patch; with strength 0, one without it."""
        clone = model.clone()
        if self.strength != 0:
            clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self._key, self.begin_run)
            clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self._key, self.prepare_call)
            clone.set_model_attn2_output_patch(self)
        return clone

    def begin_run(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``OUTER_SAMPLE`` wrapper: give this sampling run a place for its projected vectors."""
        executor.class_obj.model_options["transformer_options"][self._key] = Run(self)  # type: ignore[attr-defined]
        return executor(*args, **kwargs)

    def prepare_call(
        self,
        executor: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Any:
        """``APPLY_MODEL`` wrapper: decide once per call whether and what each layer adds."""
        options = {} if transformer_options is None else transformer_options
        run = options.get(self._key) or Run(self)
        run.prepare(executor.class_obj, x, t, options)  # type: ignore[attr-defined]
        options[self._key] = run
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def __call__(self, n: Tensor, extra_options: Options) -> Tensor:
        """``attn2_output_patch``: add the users' vectors to ``n``, ``[batch, tokens, hidden]``."""
        run: Run | None = extra_options.get(self._key)
        if run is None:
            raise AdapterError(
                "Another node calls the model in a way that leaves out PSA's preparation, so nothing would be "
                "protected. Remove that node, or place Apply PSA behind it."
            )
        return n if run.idle else n + run.addition(n, extra_options)


class Run:
    """One sampling run: the vectors projected by the model as it is now, and what the current call adds."""

    def __init__(self, patch: UserPatch) -> None:
        """Begin a run; the projection waits for the first call, which knows device and precision."""
        self._patch = patch
        self._range: tuple[float, float] | None = None
        self._table: Tensor | None = None
        self._table_holds = False
        self._prepared: dict[tuple[tuple[int, ...], int], tuple[Tensor, ...]] = {}
        self._batch = 0
        self._current: tuple[Tensor, ...] = ()
        self.idle = False

    @torch.no_grad()
    def prepare(self, model: Any, x: Tensor, sigma: Tensor, options: Options) -> None:
        """Get ready for a call of ``model`` (ComfyUI's BaseModel) on ``x``, ``[batch, ...]``."""
        self.idle = not self._in_range(model, sigma)
        if self.idle:
            return
        dtype = model.manual_cast_dtype or model.get_dtype()
        patcher = getattr(model, "current_patcher", None)
        hooked = patcher is not None and patcher.current_hooks is not None
        if hooked or not self._table_holds:
            self._table = self._project(model.diffusion_model, dtype, x.device)
            self._prepared.clear()
            # Hooks change the weights between calls of one run, so their projections serve one call only.
            self._table_holds = not hooked
        self._batch = x.shape[0]
        self._current = self._rows_for(options.get("cond_or_uncond") or [CONDITIONAL], self._batch)

    def addition(self, n: Tensor, extra_options: Options) -> Tensor:
        """Return what a layer adds to its output ``n``: ``[batch, 1, hidden]``."""
        rows = self._current
        if n.shape[0] != self._batch:
            chunks = extra_options.get(COUPLE_KEY)
            if chunks is None:
                raise AdapterError(
                    f"Another node changed the batch inside the attention from {self._batch} to {n.shape[0]}, and "
                    "PSA cannot tell which image belongs to whom. Remove that node."
                )
            rows = self._rows_for(chunks, n.shape[0])
        block = extra_options["block"]
        return rows[self._patch.index[BlockKey(block[0], block[1], extra_options["block_index"])]]

    def _in_range(self, model: Any, sigma: Tensor) -> bool:
        patch = self._patch
        if patch.start_percent <= 0 and patch.end_percent >= 1:
            return True
        if self._range is None:
            sampling = model.model_sampling
            begin = float(sampling.percent_to_sigma(patch.start_percent))
            end = float(sampling.percent_to_sigma(patch.end_percent)) if patch.end_percent < 1 else -math.inf
            self._range = (begin, end)
        # Half open, so that ranges which follow each other share no step.
        return self._range[0] >= float(sigma.max()) > self._range[1]

    def _project(self, unet: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the table ``[users + 1, sum of hidden sizes]``: per user and null, what each layer adds."""
        patch = self._patch
        columns = []
        for site, rows in zip(patch.sites, patch.rows, strict=True):
            to_out = unet.get_submodule(site.path).to_out
            columns.append(_through(to_out, rows, dtype, device) * patch.strength)  # type: ignore[arg-type]
        return torch.cat(columns, dim=1).to(dtype)

    def _rows_for(self, chunks: Sequence[int], batch: int) -> tuple[Tensor, ...]:
        """Return per site ``[batch, 1, hidden]`` for a batch of equal chunks, conditional (0) or not."""
        key = (tuple(chunks), batch)
        if key not in self._prepared:
            assert self._table is not None
            index = torch.tensor(self._row_numbers(*key), device=self._table.device)
            sizes = [rows.shape[1] for rows in self._patch.rows]
            self._prepared[key] = torch.split(self._table[index][:, None], sizes, dim=2)
        return self._prepared[key]

    def _row_numbers(self, chunks: tuple[int, ...], batch: int) -> list[int]:
        users = self._patch.users
        images, rest = divmod(batch, len(chunks))
        if rest or users not in (1, images):
            raise AdapterError(
                f"Apply PSA got {users} user embeddings for {images} images. Use one embedding for all images, or "
                "set the batch size of the latent to the number of embeddings."
            )
        of_user = list(range(users)) if users == images else [0] * images
        return [row for chunk in chunks for row in (of_user if chunk == CONDITIONAL else [users] * images)]


def _through(to_out: nn.Module, rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``to_out(rows) - to_out(0)`` in float32, ``[rows, hidden]``, computed by the layer in ``dtype``.

    ``rows`` are in main memory, so that their size is known without waiting for the device.
    """
    peak = float(rows.abs().max())
    scale = 2.0 ** math.floor(math.log2(_PROJECTION_PEAK / peak)) if peak > 0 else 1.0
    scaled = torch.cat([rows * scale, torch.zeros_like(rows[:1])]).to(device, dtype)
    out = to_out(scaled[:, None])[:, 0].float()
    return (out[:-1] - out[-1:]) / scale
