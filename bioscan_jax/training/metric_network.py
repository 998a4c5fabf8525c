"""A residual network on whitened vectors, trained so that the nearest neighbour shares the taxon.

The loss is `losses.neighbour_loss`, between one row of each species and another.
"""

import functools
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int32

from bioscan_jax import config
from bioscan_jax.errors import InputError
from bioscan_jax.location import read_if_exists, write_whole
from bioscan_jax.model.projection import ResidualNetwork, unit
from bioscan_jax.notebook import progress_bar
from bioscan_jax.table.plan import differences
from bioscan_jax.training.losses import neighbour_loss
from bioscan_jax.training.metric_moments import GENUS

Params = dict[str, Float[Array, "..."]]
_WARMUP_STEPS = 20
_LAST_RATE = 0.02
"""Learning rate at the last step, as a share of the highest."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows to train on."""

    vectors: Float32[np.ndarray, "n mid"]
    """Whitened, with a root mean square of 1 per coordinate."""
    species: Int32[np.ndarray, " n"]
    paths: Int32[np.ndarray, "species 7"]
    """Taxa of each species of the label space."""

    @functools.cached_property
    def of_species(self) -> list[np.ndarray]:
        """Positions of the rows of each species that has any."""
        order = np.argsort(self.species, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.species[order])) + 1)

    @functools.cached_property
    def taxa(self) -> Int32[np.ndarray, "present 7"]:
        """Taxa of the species in `of_species`."""
        return self.paths[[self.species[rows[0]] for rows in self.of_species]]

    @functools.cached_property
    def genera(self) -> list[np.ndarray]:
        """For each genus, positions of its species in `of_species`; a species without a genus stands alone."""
        genus = self.taxa[:, GENUS].astype(np.int64)
        alone = genus < 0
        genus[alone] = len(self.paths) + np.flatnonzero(alone)
        order = np.argsort(genus, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(genus[order])) + 1)

    def draw(
        self, species: int, seed: int, step: int
    ) -> tuple[Float32[np.ndarray, "b mid"], Float32[np.ndarray, "b mid"], Int32[np.ndarray, "b 7"]]:
        """Draws whole genera until there are enough species, and two rows of each species, different where it has two.

        Returns:
            The first rows, the second rows, and their taxa.
        """
        rng = np.random.default_rng([seed, step])
        count = min(species, len(self.of_species))
        chosen = np.concatenate([self.genera[i] for i in rng.permutation(len(self.genera))])[:count]
        first, second = np.empty(count, np.int64), np.empty(count, np.int64)
        for i, one in enumerate(chosen.tolist()):
            rows = self.of_species[one]
            first[i], second[i] = rng.permutation(rows)[:2] if len(rows) > 1 else (rows[0], rows[0])
        return self.vectors[first], self.vectors[second], self.taxa[chosen]


def initial_params(mid: int, settings: config.MetricConfig) -> Params:
    """Returns the network before training: the skip connection copies the leading coordinates."""
    first, second = jax.random.split(jax.random.key(settings.seed))
    hidden, width = settings.hidden, min(settings.width, mid)
    return {
        "skip": jnp.eye(mid, width),
        "w1": jax.random.normal(first, (mid, hidden)) / np.sqrt(mid),
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, width)) * 0.5 / np.sqrt(hidden),
    }


def _outputs(
    params: Params, x: Float[Array, "b mid"], key: Array, settings: config.MetricConfig
) -> Float[Array, "b out"]:
    """Returns the unit outputs of the network with dropout of inputs and hidden units."""
    inputs, units = jax.random.split(key)
    keep = 1.0 - settings.input_dropout
    x = x * jax.random.bernoulli(inputs, keep, x.shape) / keep
    hidden = jax.nn.gelu(x @ params["w1"] + params["b1"][None])
    keep = 1.0 - settings.hidden_dropout
    hidden = hidden * jax.random.bernoulli(units, keep, hidden.shape) / keep
    return unit(x @ params["skip"] + hidden @ params["w2"])


def _optimizer(settings: config.MetricConfig) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        min(_WARMUP_STEPS, settings.steps - 1),
        settings.steps,
        settings.learning_rate * _LAST_RATE,
    )
    decayed = {"skip": False, "w1": True, "b1": False, "w2": True}
    return optax.adamw(rate, b2=0.99, weight_decay=settings.weight_decay, mask=decayed)


@functools.partial(jax.jit, static_argnames="settings")
def _step(
    params: Params,
    state: Any,
    first: Float[Array, "b mid"],
    second: Float[Array, "b mid"],
    taxa: Int32[Array, "b 7"],
    step: Int32[Array, ""],
    settings: config.MetricConfig,
) -> tuple[Params, Any, Float[Array, ""]]:
    key = jax.random.fold_in(jax.random.key(settings.seed + 1), step)

    def loss(params: Params) -> Float[Array, ""]:
        one, other = jax.random.split(key)
        cosines = _outputs(params, first, one, settings) @ _outputs(params, second, other, settings).T
        return neighbour_loss(settings.scale * cosines, taxa, settings.rank_weights)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = _optimizer(settings).update(gradients, state, params)
    return cast(Params, optax.apply_updates(params, updates)), state, value


@dataclass
class Run:
    """One training of the network, saved every few steps so that the same command continues it."""

    path: str
    """The checkpoint: path or URL of an .npz file."""
    identity: dict[str, Any]
    """Everything that determines the result; a checkpoint of another run is refused."""
    settings: config.MetricConfig
    history: list[dict[str, float]] = field(default_factory=list)
    """Step, loss and held-out figures of each evaluation."""

    def train(
        self,
        rows: Rows,
        steps: int,
        *,
        description: str,
        evaluate: Callable[[Params], dict[str, float]] | None = None,
        progress: bool = True,
    ) -> Params:
        """Trains, from the checkpoint if there is one, until `steps` or until the held-out figure stops rising.

        Args:
            rows: What to train on.
            steps: Steps in all; the learning rate falls over `settings.steps` whatever this is.
            description: Text of the progress bar.
            evaluate: Returns figures of held-out rows, among them `genus`, which decides when to stop; if absent, all
                steps are done.
            progress: Show a progress bar on stderr.

        Raises:
            InputError: The checkpoint is damaged, is of another run, or cannot be written.
        """
        params = initial_params(rows.vectors.shape[1], self.settings)
        state = _optimizer(self.settings).init(params)
        step, (params, state) = self._restore((params, state))
        with progress_bar(total=steps, initial=step, unit="step", desc=description, disable=not progress) as bar:
            while step < steps and not self._stalled():
                first, second, taxa = rows.draw(self.settings.species_per_batch, self.settings.seed, step)
                params, state, loss = _step(params, state, first, second, taxa, jnp.int32(step), self.settings)
                step += 1
                if evaluate is not None and (step % self.settings.evaluate_every == 0 or step == steps):
                    self.history.append({"step": float(step), "loss": float(loss)} | evaluate(params))
                if step % self.settings.checkpoint_every == 0 or step == steps:
                    self._save(step, (params, state))
                bar.update()
        return params

    def _stalled(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        figures = [entry["genus"] for entry in self.history]
        return len(figures) - 1 - int(np.argmax(figures)) >= self.settings.patience if figures else False

    def _restore(self, fresh: tuple[Params, Any]) -> tuple[int, tuple[Params, Any]]:
        leaves, tree = jax.tree.flatten(fresh)
        data = read_if_exists(self.path)
        if data is None:
            return 0, fresh
        try:
            with np.load(io.BytesIO(data)) as saved:
                found = json.loads(str(saved["about"]))
                changed = differences(found["identity"], self.identity)
                restored = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(leaves))] if not changed else []
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: not readable ({error}); remove it to train again") from error
        if changed:
            raise InputError(
                f"{self.path} is of a run with other settings: {changed}; pass these again, or remove {self.path.rpartition('/')[0]}"
            )
        self.history = found["history"]
        return found["step"], jax.tree.unflatten(tree, restored)

    def _save(self, step: int, trees: tuple[Params, Any]) -> None:
        about = json.dumps({"identity": self.identity, "step": step, "history": self.history})
        arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
        file = io.BytesIO()
        np.savez(file, about=np.array(about), **arrays)
        try:
            write_whole(self.path, file.getvalue())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error}); free space, then run again") from error


def as_network(params: Params, length: float) -> ResidualNetwork:
    """Returns the network for inputs that are not scaled: the scale of its training goes into its matrices.

    Args:
        params: The trained network.
        length: Whitened vectors were multiplied by this.
    """
    values = {name: np.asarray(value, np.float32) for name, value in params.items()}
    scale = np.float32(length)
    return ResidualNetwork(skip=values["skip"] * scale, w1=values["w1"] * scale, b1=values["b1"], w2=values["w2"])


@jax.jit
def network_outputs(params: Params, x: Float[Array, "b mid"]) -> Float[Array, "b out"]:
    """Returns the unit outputs of the network without dropout."""
    return unit(x @ params["skip"] + jax.nn.gelu(x @ params["w1"] + params["b1"][None]) @ params["w2"])
