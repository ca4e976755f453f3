"""One sampling run with PSA: what each layer adds, projected by the model as it is now, and what came of it.

A patch never changes; runs and calls have objects of their own, which travel in ``transformer_options``. Calls may
come from several threads.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import AdapterError, BlockKey, SiteGate
from .regions import RegionRun, Step, Weights
from .roles import COUPLE_KEY, Options, Roles, chunks_of_user, made_of_others
from .text_side import Changed, TextSide

if TYPE_CHECKING:
    from .patch import UserPatch

# Values are scaled up to this size (by a power of two, so exactly) while a layer projects them: then its
# bias, which cancels out, costs no precision in half floats.
_PROJECTION_PEAK = 64.0
_HALVINGS = 24

logger = logging.getLogger(__name__)


class Layers(NamedTuple):
    """What each site adds for one make-up of a batch.

    ``constant[i]`` is ``[batch, 1, hidden]``, a part of ``vectors``, ``[batch, 1, sum of hidden sizes]``. ``gates[i]``
    are those of the user's pictures alone, ``places`` says which these are in the batch (None: all). What the adapter
    lacks is empty.
    """

    vectors: Tensor | None
    constant: tuple[Tensor, ...]
    gates: tuple[SiteGate, ...]
    places: Tensor | None

    def times(self, factor: float) -> Layers:
        """Return what the sites add at this share of the strength."""
        if factor == 1:
            return self
        gates = tuple(gate._replace(values=factor * gate.values) for gate in self.gates)
        if self.vectors is None:
            return self._replace(gates=gates)
        vectors = factor * self.vectors
        sizes = [part.shape[2] for part in self.constant]
        return Layers(vectors, torch.split(vectors, sizes, dim=2), gates, self.places)


@dataclass(eq=False)
class Table:
    """Behind ``to_out``, with the strength: per user and null what each layer adds, and what was cut from it.

    ``constant`` is ``[users + 1, sum of hidden sizes]``.
    """

    constant: Tensor | None
    gates: tuple[SiteGate, ...]
    dtype: torch.dtype
    layers: dict[tuple[Roles, int], Layers] = field(default_factory=dict)


@dataclass
class Call:
    """One call of the model; ``layers`` is None if they are left alone.

    ``factor`` is how much of the strength counts. ``of_user`` and ``text_of_user`` say for each chunk of the batch
    whether it is the user's, and whether its text is. ``weights`` is None if layers count fully everywhere.
    """

    run: Run
    batch: int
    chunks: tuple[int, ...]
    of_user: Roles
    text_of_user: Roles
    factor: float = 0.0
    layers: Layers | None = None
    weights: Weights | None = None
    text_read: bool = False
    handed: Tensor | None = None  # the text that the layer which is running has been given
    reached: set[int] = field(default_factory=set)

    def __deepcopy__(self, memo: dict[int, object]) -> Call:
        """Return itself: some nodes copy the options in which it travels."""
        return self

    @property
    def active(self) -> bool:
        """Whether PSA acts in this step."""
        return self.factor != 0

    def site(self, n: Tensor, extra_options: Options) -> int:
        """Return the number of the site that is running; ``n`` has to have the call's batch."""
        if n.shape[0] != self.batch:
            raise AdapterError(
                f"Another node changed the batch inside the attention from {self.batch} to {n.shape[0]}, and PSA "
                "cannot tell which image belongs to whom. Remove that node."
            )
        block = extra_options["block"]
        site = self.run.patch.index[BlockKey(block[0], block[1], extra_options["block_index"])]
        self.reached.add(site)
        return site

    def put_in(self, context: Tensor, extra_options: Options) -> Roles:
        """Return for each chunk of the text that another node has changed inside a layer whether it has been put in,
        and is the user's.

        Raises:
            AdapterError: that node does not tell, as Attention Couple does.
        """
        couple = extra_options.get(COUPLE_KEY, ())
        new = made_of_others(couple, self.chunks)
        if not new or context.shape[0] * len(self.chunks) != self.batch * len(couple):
            raise AdapterError(
                "Another node changes the text inside the attention, and PSA cannot tell whose it is, so the picture "
                "would not be protected. Remove that node, or use an adapter that does not act on text."
            )
        return tuple(put_in and self.text_of_user[chunk] for chunk, put_in in new)


class Run:
    """One sampling run: what the layers add, and the prompts as their users have them."""

    def __deepcopy__(self, memo: dict[int, object]) -> Run:
        """Return itself: some nodes copy the options in which it travels."""
        return self

    def __init__(self, patch: UserPatch, latent: torch.Size) -> None:
        """Begin a run on latents ``[images, channels, height, width]``.

        The projection waits for the first call, which knows device and precision.

        Raises:
            AdapterError: the patch's masks are not for these.
        """
        self.patch = patch
        self.region: RegionRun | None = None
        if patch.region is not None:
            patch.region.check(latent[0], *latent[-2:])
            if not patch.region.everywhere:
                self.region = RegionRun(patch.region, *latent[-2:])
        self.text = TextSide(patch.key, patch.text, patch.strength) if patch.text else None
        self._lock = threading.Lock()
        self._tables: dict[tuple[torch.device, torch.dtype], Table] = {}
        self._factors: dict[float, float] = {}
        self._calls = 0
        self._active_calls = 0
        self._reached: set[int] = set()

    @torch.no_grad()
    def prepare(self, model: Any, x: Tensor, sigma: Tensor, options: Options, step: Step | None) -> Call:
        """Return the call of ``model`` (ComfyUI's BaseModel) on ``x``, ``[batch, ...]``."""
        chunks = tuple(options.get("cond_or_uncond") or [0])
        of_user = text_of_user = chunks_of_user(chunks, None if step is None else step.roles)
        if step is not None:
            outside = step.is_outside(options, self.patch.key)
            text_of_user = tuple(user and not other for user, other in zip(of_user, outside, strict=True))
        call = Call(self, x.shape[0], chunks, of_user, text_of_user, self.factor(model, sigma))
        if not call.active and not (self.patch.acts_on_layers and _is_compiled(model.diffusion_model)):
            return call
        if step is None and self.region is not None and self.text is not None:
            raise AdapterError(
                "Another node calls the model itself, and a mask divides prompts where a sampler hands them over: PSA "
                "cannot tell where in the picture this prompt acts. Remove that node, or the mask."
            )
        masks = 1 if self.patch.region is None else len(self.patch.region.masks)
        images = options["sigmas"].shape[0] if "sigmas" in options else x.shape[0] // len(chunks)
        alone = max(len(chunks), self.patch.users) == 1 and self.region is None
        if not alone and x.shape[0] != len(chunks) * images:
            raise AdapterError(
                f"Another node put {x.shape[0]} pictures into one call where {len(chunks)} times {images} were "
                "expected (tiles?), and PSA cannot tell which belongs to whom. Remove that node, or let it work on "
                "one tile at a time."
            )
        if max(self.patch.users, masks) > 1 and options.get("context_window") is not None:
            got = f"{self.patch.users} user embeddings" if self.patch.users > 1 else f"{masks} masks"
            raise AdapterError(
                f"Apply PSA got {got}, and a context window lets the model see a part of the batch at a time, so PSA "
                "cannot tell which image belongs to whom. Use one for all images."
            )
        self._row_numbers(call.of_user, x.shape[0])
        if self.patch.acts_on_layers:
            table = self._table(model, x.device)
            call.layers = self._layers(table, call).times(call.factor)
            if self.region is not None:
                call.weights = self.region.weights(x, table.dtype, len(chunks), options, step)
        return call

    def conditionings(
        self, conds: Sequence[Sequence[Options] | None], step: Step, factor: float
    ) -> tuple[list[Sequence[Options] | None], tuple[Changed, ...]]:
        """Return a guider's conditionings as the users have them, see ``TextSide.conditionings``."""
        text, region, key = self.text, self.region, self.patch.key
        assert text is not None
        if region is None:
            return text.conditionings(conds, step.roles, step.changed, factor)
        return text.conditionings(
            conds, step.roles, step.changed, factor, lambda cond, own: region.split(cond, own, step.x, key)
        )

    def note(self, call: Call) -> None:
        """Take down what a finished call has used."""
        with self._lock:
            self._calls += 1
            self._active_calls += call.active
            self._reached |= call.reached

    def check(self) -> None:
        """Raise AdapterError if the run is over and its pictures were not, or not everywhere, made with PSA."""
        sites = len(self.patch.sites) if self.patch.acts_on_layers else 0
        if not self._calls or (self._active_calls and len(self._reached) < sites):
            raise left_out(f" ({len(self._reached)} of {sites} layers were reached)" if sites else "")
        if not self._active_calls:
            logger.warning(
                "PSA did not act: no step of this run lies between start_percent %g and end_percent %g with a strength "
                "above 0 and a mask that is not empty.",
                self.patch.start_percent,
                self.patch.end_percent,
            )

    def factor(self, model: Any, sigma: Tensor) -> float:
        """Return how much of the strength counts in a step at this noise: 0 outside of the patch's range."""
        patch = self.patch
        if patch.start_percent <= 0 and patch.end_percent >= 1 and patch.curve.is_flat:
            return patch.curve.at(0)
        noise = float(sigma.max())
        with self._lock:
            if noise not in self._factors:
                self._factors[noise] = self._factor(model.model_sampling.percent_to_sigma, noise)
            return self._factors[noise]

    def _factor(self, to_sigma: Callable[[float], Any], noise: float) -> float:
        patch = self.patch
        begin = float(to_sigma(patch.start_percent)) if patch.start_percent > 0 else math.inf
        end = float(to_sigma(patch.end_percent)) if patch.end_percent < 1 else -math.inf
        # Half open, so that ranges which follow each other share no step.
        if not begin >= noise > end:
            return 0.0
        if patch.curve.is_flat:
            return patch.curve.at(0)
        # Halved until the place in the range is known as well as a float knows it.
        first, last = 0.0, 1.0
        for _ in range(_HALVINGS):
            place = (first + last) / 2
            percent = patch.start_percent + place * (patch.end_percent - patch.start_percent)
            first, last = (place, last) if float(to_sigma(percent)) > noise else (first, place)
        return patch.curve.at((first + last) / 2)

    def _layers(self, table: Table, call: Call) -> Layers:
        key = (call.of_user, call.batch)
        with self._lock:
            if key not in table.layers:
                table.layers[key] = self._cut(table, *key)
            return table.layers[key]

    def _row_numbers(self, of_user: Roles, batch: int) -> list[int]:
        """Return whose row each picture of a batch has: a user's number, or the number of users for nobody.

        Raises:
            AdapterError: the pictures of a chunk are no multiple of the users.
        """
        users = self.patch.users
        images, rest = divmod(batch, len(of_user))
        if rest or images % users:
            raise AdapterError(
                f"Apply PSA got {users} user embeddings for {images} images. Use one embedding for all images, or "
                "set the batch size of the latent to the number of embeddings, or to a multiple of it."
            )
        own = [image % users for image in range(images)]
        return [row for user in of_user for row in (own if user else [users] * images)]

    def _cut(self, table: Table, of_user: Roles, batch: int) -> Layers:
        numbers = self._row_numbers(of_user, batch)
        vectors: Tensor | None = None
        constant: tuple[Tensor, ...] = ()
        if table.constant is not None:
            # Made in this shape: a compiled model looks at what a tensor is a view of.
            vectors = table.constant[:, None][torch.tensor(numbers, device=table.constant.device)]
            constant = torch.split(vectors, [row.shape[1] for row in self.patch.rows], dim=2)
        gates, places = table.gates, None
        if gates:
            device = gates[0].scores.device
            mine = [place for place, row in enumerate(numbers) if row < self.patch.users]
            if not mine:
                return Layers(vectors, constant, (), None)
            places = None if len(mine) == batch else torch.tensor(mine, device=device)
            # One user's matrices need no batch of their own.
            rows = 0 if self.patch.users == 1 else torch.tensor([numbers[place] for place in mine], device=device)
            gates = tuple(SiteGate(gate.scores[rows], gate.values[rows], gate.sink) for gate in gates)
        return Layers(vectors, constant, gates, places)

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
        """Send all rows of a layer through its ``to_out`` at once: what a layer does to its weights is slow."""
        patch, columns, gates = self.patch, [], []
        for i, site in enumerate(patch.sites):
            constant = patch.rows[i] if patch.rows else patch.gates[i].values.new_zeros(0, site.hidden_size)
            gated = patch.gates[i].values.flatten(0, 1) if patch.gates else constant[:0]
            to_out = unet.get_submodule(f"{site.path}.to_out")
            out = _through(to_out, torch.cat((constant, gated)), dtype, device) * patch.strength
            columns.append(out[: len(constant)])
            if patch.gates:
                gate = patch.gates[i]
                values = out[len(constant) :].reshape(*gate.values.shape[:2], -1)
                gates.append(SiteGate(gate.scores.to(device), values, gate.sink.to(device)).to(dtype))
        return Table(torch.cat(columns, dim=1).to(dtype) if patch.rows else None, tuple(gates), dtype)


def _is_compiled(unet: nn.Module) -> bool:
    """Return whether ``torch.compile`` made it: then layers add zeros where they rest, which is exact as well.

    Without what they add, it would be another program, and be compiled once more.
    """
    return hasattr(unet, "_orig_mod")


def left_out(detail: str = "") -> AdapterError:
    """Return the error of a call that would have made a picture without PSA."""
    return AdapterError(
        f"Another node calls the model in a way that leaves PSA out{detail}, so the picture would not be protected. "
        "Remove that node, or place Apply PSA behind it, right before the sampler."
    )


def _through(to_out: nn.Module, rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``to_out(rows) - to_out(0)`` in float32, ``[rows, hidden]``, computed by the layer in ``dtype``.

    ``rows`` are in main memory; each is scaled by itself, so that none is small beside another.
    """
    peaks = rows.abs().amax(dim=1, keepdim=True)
    scale = torch.where(peaks > 0, 2.0 ** torch.floor(torch.log2(_PROJECTION_PEAK / peaks)), 1.0)
    scaled = torch.cat([rows * scale, torch.zeros_like(rows[:1])]).to(device, dtype)
    out = to_out(scaled[:, None])[:, 0].float()
    return (out[:-1] - out[-1:]) / scale.to(device)
