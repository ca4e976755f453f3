"""What a run trains on and looks at: caches opened, pairs split, an adapter made for the base model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from accelerate import PartialState
from rich.progress import Progress
from torch import Tensor

from ..adapter import PSAAdapter
from ..profiles import Profile, levels
from ..profiles.encoders.attributes import DIM as ATTRIBUTES_DIM
from .base import BaseModel
from .config import LossSection, TrainConfig
from .data.cache import build_cache
from .data.cached import CachedPairs
from .data.pairs import open_pairs
from .data.split import split_pairs
from .data.users import encoder_spec, load_user_embedding
from .dpo.batches import Batches
from .dpo.draws import Draws
from .dpo.trainable import new_adapter_config, standardise
from .errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Batches to train on, batches to look at by name, and users for the columns of image grids.

    ``left_out`` counts the rows that cannot be used, by the setting that names their source.
    """

    cached: CachedPairs
    train: Batches
    validation: Mapping[str, Batches]
    grid_users: Mapping[str, Tensor]
    left_out: Mapping[str, int]

    @property
    def users(self) -> tuple[str, ...]:
        """The ids of the users that are trained on."""
        return tuple(sorted({self.cached.row_users[i] for i in self.train.indices}))


def prepare_data(
    config: TrainConfig, base: BaseModel, state: PartialState, draws: Draws, progress: Progress | None
) -> TrainingData:
    """Open the caches of all splits, computing what is missing, and split off what is only looked at.

    Raises:
        DataError: a source cannot be used, or a split of unseen users holds users of the training data.
    """
    validation = config.validation
    looking = validation.every > 0
    captions = validation.grid_prompts if validation.grid_every else ()
    grid_users = _grid_users_from_folder(config)
    for path in (validation.seen, validation.unseen):
        if looking and path is not None:
            open_pairs(path)  # a wrong path should be known before anything is cached
    cached = build_cache(config, config.data.train, base, captions, _grid_profiles(config), state, progress)
    split = split_pairs(
        cached.row_users,
        validation.held_out if looking and validation.seen is None else 0,
        validation.unseen_users if looking and validation.unseen is None else 0,
        draws.generator("split", 0),
    )

    def batches(pairs: CachedPairs, indices: Sequence[int]) -> Batches:
        return Batches(pairs, indices, draws, config.data.resolution)

    def mixed(indices: Sequence[int]) -> list[int]:
        # Only the first ones are looked at, and a set may be sorted by user.
        order = torch.randperm(len(indices), generator=draws.generator("validation order", 0))
        return [indices[int(i)] for i in order]

    splits = {
        name: batches(cached, mixed(indices)) for name, indices in (("seen", split.seen), ("unseen", split.unseen))
    }
    left_out = {"data.train": len(cached.skipped)}
    for name, path in (("seen", validation.seen), ("unseen", validation.unseen)):
        if looking and path is not None:
            other = build_cache(config, path, base, (), {}, state, progress)
            splits[name] = batches(other, mixed(range(len(other))))
            left_out[f"validation.{name}"] = len(other.skipped)
            if name == "unseen":
                _check_unseen({cached.row_users[i] for i in split.train}, set(other.users), config)
    validated = {name: found for name, found in splits.items() if found.indices}
    training = batches(cached, split.train)
    if not training.preferences:
        raise DataError(
            f"There is nothing to learn from {config.data.train}: with loss.fidelity pairs are preferences where their "
            f"user bans what they show, and all {len(split.train)} that are trained on are allowed. Add pairs of "
            "banned categories, or set loss.fidelity = 0."
        )
    return TrainingData(cached, training, validated, grid_users or dict(_grid_users(config, cached)), left_out)


def make_adapter(config: TrainConfig, base: BaseModel, data: TrainingData) -> PSAAdapter:
    """Return an untrained adapter for the base model and the users' embeddings.

    Raises:
        DataError: the embeddings cannot come from the encoder that the configuration names.
        AdapterError: the base model has no cross-attention layers.
    """
    embeddings = torch.stack([data.cached.user(user) for user in data.users])
    dim = embeddings.shape[1]
    spec = encoder_spec(config.data.encoder)
    if spec.kind == "attributes" and dim != ATTRIBUTES_DIM:
        raise DataError(
            f"The user embeddings have {dim} numbers, but data.encoder says {spec.name}, which gives {ATTRIBUTES_DIM}. "
            "State in [data.encoder] what made them: kind, name, and the template."
        )
    described = new_adapter_config(config.adapter, base, dim, spec)
    adapter = PSAAdapter(described.model_copy(update={"training": _history(config, base, data)}))
    if config.adapter.standardise and len(embeddings) < 2:
        raise DataError(
            "All training pairs belong to one user: there is nothing to standardise, and the adapter would hold that "
            "user's embedding. Add users, or set adapter.standardise = false."
        )
    if config.adapter.standardise:
        standardise(adapter, embeddings)
    return adapter


def seeded(adapter: PSAAdapter, draws: Draws) -> PSAAdapter:
    """Draw the first weights from the run's seed, as ``torch.nn.Linear`` draws them; what is zero stays zero."""
    zero = {id(weight) for weight in adapter.zero_at_start()}
    generator = draws.generator("weights", 0)
    for linear in (module for module in adapter.modules() if isinstance(module, torch.nn.Linear)):
        bound = linear.in_features**-0.5
        for parameter in (linear.weight, linear.bias):
            if parameter is not None and id(parameter) not in zero:
                torch.nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return adapter


def _history(config: TrainConfig, base: BaseModel, data: TrainingData) -> dict[str, str | int | float]:
    """How the adapter was made, for its file: settings and sizes, no paths and no people."""
    return {
        "method": "Diffusion-DPO",
        "base_model": config.model.base.name,
        "prediction_type": base.prediction_type,
        "resolution": config.data.resolution,
        "pairs": len(data.train.indices),
        "users": len(data.users),
        "beta": config.loss.beta,
        "learning_rate": config.optimizer.learning_rate,
        "user_dropout": config.loss.user_dropout,
        "prompt_dropout": config.loss.prompt_dropout,
        **_beyond_the_paper(config.loss),
        "steps": 0,  # the trainer counts them
        "seed": config.run.seed,
        "version": version("personalized-safety-alignment"),
    }


def _beyond_the_paper(loss: LossSection) -> dict[str, int | float]:
    """The options of the loss that are on, by name."""
    named: dict[str, int | float] = loss.model_dump(
        exclude_defaults=True, exclude={"beta", "user_dropout", "prompt_dropout"}
    )
    if named.keys() & {"final_beta", "final_winner_anchor"}:
        named["switch_at"] = loss.switch_at
    return named


def _grid_profiles(config: TrainConfig) -> dict[str, Profile]:
    if not config.validation.grid_every or config.validation.grid_users or config.data.embeddings is not None:
        return {}
    return {level.id: level.profile for level in levels()}


def _grid_users_from_folder(config: TrainConfig) -> dict[str, Tensor]:
    """Read the embeddings of the grids' columns before anything is cached: a wrong id should be known early."""
    folder, names = config.data.embeddings, config.validation.grid_users
    if not config.validation.grid_every or folder is None:
        return {}
    if not names:
        logger.warning(
            "PSA: no image grids will be drawn: with data.embeddings the levels have no embeddings. Name User_IDs of "
            "that folder in validation.grid_users."
        )
    try:
        return {name: load_user_embedding(folder, name) for name in names}
    except DataError as error:
        raise DataError(f"validation.grid_users: {error}") from None


def _grid_users(config: TrainConfig, cached: CachedPairs) -> Iterator[tuple[str, Tensor]]:
    if not config.validation.grid_every or config.data.embeddings is not None:
        return
    for name in config.validation.grid_users or _grid_profiles(config):
        if name not in cached.users and config.validation.grid_users:
            raise DataError(
                f"validation.grid_users names {name}, who is no user of {config.data.train}. Name User_IDs of that "
                "data, or leave the line out for the levels L0 to L5."
            )
        yield name, cached.user(name)


def _check_unseen(training: set[str], unseen: set[str], config: TrainConfig) -> None:
    if both := sorted(training & unseen):
        raise DataError(
            f"{len(both)} users of {config.validation.unseen} are also in {config.data.train} (the first is "
            f"{both[0]}), so they are not unseen. Choose another split for validation.unseen."
        )
