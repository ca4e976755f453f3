"""The patch on a ComfyUI model: a user's vectors, added behind ``to_out`` of every cross-attention layer.

The vectors of an adapter stand in front of ``to_out``. They are projected with the model's own layers when
sampling begins, in whatever state those are then (LoRA, fp8, offloaded), and live for that run only:

    to_out(a + v) = to_out(a) + (to_out(v) - to_out(0))

Wrappers around a sampling run and around each call of the model work out what every image gets; an
``attn2_output_patch`` then adds one prepared tensor per layer. The patch itself never changes: a run and a call
have objects of their own, which travel in ``transformer_options``.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ..adapter import AdapterError, BlockKey, Site, SiteVectors

COUPLE_KEY = "cond_or_uncond_couple"  # left by Attention Couple, which repeats conditional chunks

# How guiders name the conditionings that are no prompt of the user's ("negative", "empty_negative_prompt").
_UNCONDITIONAL_NAMES = ("negative", "uncond", "empty")
_ROLE_KEY = "psa_role"

# Values are scaled up to this size (by a power of two, so exactly) while a layer projects them: then its
# bias, which cancels out, costs no precision in half floats.
_PROJECTION_PEAK = 64.0

Options = dict[str, Any]
Roles = tuple[bool, ...]

logger = logging.getLogger(__name__)


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
        self._run_key = f"{self._key}_run"
        self._roles_key = f"{self._key}_roles"

    def __deepcopy__(self, memo: dict[int, object]) -> UserPatch:
        """Return itself: ComfyUI copies patches with every clone of a model."""
        return self

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """Return a clone of ``model`` with this patch; with strength 0, one without it."""
        clone = model.clone()
        if self.strength != 0:
            clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self._key, self.wrap_run)
            clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self._key, self.wrap_conds)
            clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self._key, self.wrap_call)
            clone.set_model_attn2_output_patch(self)
        return clone

    def wrap_run(
        self,
        executor: WrapperExecutor,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``OUTER_SAMPLE`` wrapper: one run, from projecting the vectors to checking that they were used."""
        guider = executor.class_obj
        for name, conds in guider.conds.items():
            for cond in conds:
                cond[_ROLE_KEY] = name
        run = Run(self)
        guider.model_options["transformer_options"][self._run_key] = run
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if len(sigmas) > 1:  # else there was no step to take
            run.check()
        return samples

    def wrap_conds(
        self, executor: WrapperExecutor, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Options
    ) -> Any:
        """``CALC_COND_BATCH`` wrapper: note which of ``conds`` are the user's, whatever order a guider uses."""
        options = {**model_options.get("transformer_options", {}), self._roles_key: _roles(conds)}
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def wrap_call(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Any:
        """``APPLY_MODEL`` wrapper: decide once per call whether and what each layer adds."""
        options = transformer_options or {}
        if self not in options.get("patches", {}).get("attn2_output_patch", ()):
            raise _left_out()
        run: Run = options.get(self._run_key) or Run(self)
        roles = options.get(self._roles_key)
        call = run.prepare(executor.class_obj, x, t, options, roles)
        options = {**options, self._key: call}
        output = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        run.note(call)
        return output

    def __call__(self, n: Tensor, extra_options: Options) -> Tensor:
        """``attn2_output_patch``: add the users' vectors to ``n``, ``[batch, tokens, hidden]``."""
        call: Call | None = extra_options.get(self._key)
        if call is None:
            raise _left_out()
        return n if call.idle else n + call.addition(n, extra_options)


@dataclass(eq=False)
class Table:
    """``[users + 1, sum of hidden sizes]``: per user and null, what each layer adds; and what was cut from it."""

    values: Tensor
    rows: dict[tuple[Roles, int], tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass
class Call:
    """One call of the UNet: what each site adds, ``[batch, 1, hidden]``; nothing if ``rows`` is empty."""

    run: Run
    batch: int
    roles: Roles | None
    table: Table | None = None
    rows: tuple[Tensor, ...] = ()
    reached: set[int] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        """Whether this step lies outside the range."""
        return not self.rows

    def addition(self, n: Tensor, extra_options: Options) -> Tensor:
        """Return what a layer adds to its output ``n``: ``[batch, 1, hidden]``."""
        block = extra_options["block"]
        site = self.run.patch.index[BlockKey(block[0], block[1], extra_options["block_index"])]
        self.reached.add(site)
        if n.shape[0] == self.batch:
            return self.rows[site]
        chunks = extra_options.get(COUPLE_KEY)
        if chunks is None:
            raise AdapterError(
                f"Another node changed the batch inside the attention from {self.batch} to {n.shape[0]}, and PSA "
                "cannot tell which image belongs to whom. Remove that node."
            )
        assert self.table is not None
        return self.run.rows_for(self.table, _of_user(chunks, self.roles), n.shape[0])[site]


class Run:
    """One sampling run: the vectors projected by the model as it is now. Calls may come from several threads."""

    def __init__(self, patch: UserPatch) -> None:
        """Begin a run; the projection waits for the first call, which knows device and precision."""
        self.patch = patch
        self._lock = threading.Lock()
        self._tables: dict[tuple[torch.device, torch.dtype], Table] = {}
        self._calls = 0
        self._active_calls = 0
        self._reached: set[int] = set()

    @torch.no_grad()
    def prepare(self, model: Any, x: Tensor, sigma: Tensor, options: Options, roles: Roles | None) -> Call:
        """Return the call of ``model`` (ComfyUI's BaseModel) on ``x``, ``[batch, ...]``."""
        call = Call(self, x.shape[0], roles)
        if not self._in_range(model, sigma):
            return call
        chunks = options.get("cond_or_uncond") or [0]
        images = options["sigmas"].shape[0] if "sigmas" in options else x.shape[0] // len(chunks)
        if len(chunks) > 1 and x.shape[0] != len(chunks) * images:
            raise AdapterError(
                f"Another node put {x.shape[0]} pictures into one call where {len(chunks)} times {images} were "
                "expected (tiles?), and PSA cannot tell which belongs to whom. Remove that node, or let it work on "
                "one tile at a time."
            )
        call.table = self._table(model, x.device)
        call.rows = self.rows_for(call.table, _of_user(chunks, roles), x.shape[0])
        return call

    def note(self, call: Call) -> None:
        """Take down what a finished call has used."""
        with self._lock:
            self._calls += 1
            self._active_calls += not call.idle
            self._reached |= call.reached

    def check(self) -> None:
        """Raise AdapterError if the run is over and its pictures were not, or not everywhere, made with PSA."""
        if not self._calls or (self._active_calls and len(self._reached) < len(self.patch.sites)):
            raise _left_out(f" ({len(self._reached)} of {len(self.patch.sites)} layers were reached)")
        if not self._active_calls:
            logger.warning(
                "PSA: no step of this run lies between start_percent %g and end_percent %g; PSA did not act.",
                self.patch.start_percent,
                self.patch.end_percent,
            )

    def rows_for(self, table: Table, of_user: Roles, batch: int) -> tuple[Tensor, ...]:
        """Return per site ``[batch, 1, hidden]`` for a batch of equal chunks, each the user's or not."""
        key = (of_user, batch)
        with self._lock:
            if key not in table.rows:
                index = torch.tensor(self._row_numbers(of_user, batch), device=table.values.device)
                sizes = [rows.shape[1] for rows in self.patch.rows]
                table.rows[key] = torch.split(table.values[index][:, None], sizes, dim=2)
            return table.rows[key]

    def _row_numbers(self, of_user: Roles, batch: int) -> list[int]:
        users = self.patch.users
        images, rest = divmod(batch, len(of_user))
        if rest or users not in (1, images):
            raise AdapterError(
                f"Apply PSA got {users} user embeddings for {images} images. Use one embedding for all images, or "
                "set the batch size of the latent to the number of embeddings."
            )
        own = list(range(users)) if users == images else [0] * images
        return [row for user in of_user for row in (own if user else [users] * images)]

    def _in_range(self, model: Any, sigma: Tensor) -> bool:
        patch = self.patch
        if patch.start_percent <= 0 and patch.end_percent >= 1:
            return True
        to_sigma = model.model_sampling.percent_to_sigma
        begin = float(to_sigma(patch.start_percent))
        end = float(to_sigma(patch.end_percent)) if patch.end_percent < 1 else -math.inf
        # Half open, so that ranges which follow each other share no step.
        return begin >= float(sigma.max()) > end

    def _table(self, model: Any, device: torch.device) -> Table:
        dtype = model.manual_cast_dtype or model.get_dtype()
        patcher = getattr(model, "current_patcher", None)
        with self._lock:
            if patcher is not None and patcher.current_hooks is not None:
                # Hooks change the weights between calls of one run, so their projections serve one call only.
                self._tables.clear()
                return self._project(model.diffusion_model, dtype, device)
            key = (device, dtype)
            if key not in self._tables:
                self._tables[key] = self._project(model.diffusion_model, dtype, device)
            return self._tables[key]

    def _project(self, unet: nn.Module, dtype: torch.dtype, device: torch.device) -> Table:
        columns = []
        for site, rows in zip(self.patch.sites, self.patch.rows, strict=True):
            to_out = unet.get_submodule(f"{site.path}.to_out")
            columns.append(_through(to_out, rows, dtype, device) * self.patch.strength)
        return Table(torch.cat(columns, dim=1).to(dtype))


def _roles(conds: Sequence[Sequence[Options] | None]) -> Roles:
    """Return for each conditioning of a call whether it is the user's.

    Its first entry counts: ComfyUI appends copies of other conditionings' areas behind it. Conditionings
    without a name (made outside of a guider) go by ComfyUI's custom that the first is the positive one.
    """
    names = [cond[0].get(_ROLE_KEY) if cond else None for cond in conds]
    return tuple(
        i == 0 if name is None else not any(word in name for word in _UNCONDITIONAL_NAMES)
        for i, name in enumerate(names)
    )


def _of_user(chunks: Sequence[int], roles: Roles | None) -> Roles:
    """Return for each chunk of ``cond_or_uncond`` whether it is the user's."""
    return tuple(chunk == 0 if roles is None else roles[chunk] for chunk in chunks)


def _left_out(detail: str = "") -> AdapterError:
    return AdapterError(
        f"Another node calls the model in a way that leaves PSA out{detail}, so the picture would not be protected. "
        "Remove that node, or place Apply PSA behind it, right before the sampler."
    )


def _through(to_out: nn.Module, rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``to_out(rows) - to_out(0)`` in float32, ``[rows, hidden]``, computed by the layer in ``dtype``.

    ``rows`` are in main memory, so that their size is known without waiting for the device.
    """
    peak = float(rows.abs().max())
    scale = 2.0 ** math.floor(math.log2(_PROJECTION_PEAK / peak)) if peak > 0 else 1.0
    scaled = torch.cat([rows * scale, torch.zeros_like(rows[:1])]).to(device, dtype)
    out = to_out(scaled[:, None])[:, 0].float()
    return (out[:-1] - out[-1:]) / scale
