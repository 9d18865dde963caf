"""Training of a dictionary, a batch of rows at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from .autoencoder import DictionaryConfig, SparseAutoencoder, check_rows
from .codes import batch_top_k
from .losses import dead_latent_loss, unexplained
from .reconstruction import Reconstruction, reconstructed

THRESHOLD_RATE = 0.01
"""Weight of a batch's smallest activation in the running mean that becomes the threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryTraining:
    """Settings of a training; ``d_sae``-dependent defaults follow dictionary_learning 0.1.0.

    Raises:
        InputError: numbers that cannot be.
    """

    n_steps: int
    batch_size: int
    """Rows of a step."""
    learning_rate: float | None = None
    """Highest of the schedule; None is ``2e-4 / sqrt(d_sae / 16384)``."""
    n_warmup: int = 1000
    """Steps over which the rate rises; at most a tenth of all."""
    decay_share: float = 0.2
    """Last share of the steps, over which the rate falls to 0."""
    aux_weight: float = 1 / 32
    """Of the dead latents' loss; 0 leaves them alone."""
    dead_after: int | None = None
    """Rows without activity after which a latent is dead; None is 2 % of all, at most 1e7."""
    resample_every: int = 0
    """Steps after which latents that are never positive begin anew; 0 is never."""
    l0_weight: float = 1.0
    """Of jumprelu's ``(L0 / k - 1)^2``."""
    l1_weight: float = 0.2
    """Of standard's sum of activations, each times the norm of its direction, a row."""
    is_centred: bool = True
    """Whether ``b_dec`` is learnt, and taken from rows before they are encoded; else it is 0."""
    is_tied: bool = False
    """Whether the encoder is the directions themselves, all along."""
    keeps_norms: bool = True
    """Whether directions keep norm 1."""
    bandwidth: float = 0.001
    """Of jumprelu's pseudo-derivative, in units of a row's root mean square norm."""

    def __post_init__(self) -> None:
        """Refuse what would train nothing."""
        rate = self.learning_rate
        faults = [
            f"{name}={getattr(self, name)}"
            for name, is_good in {
                "n_steps": self.n_steps >= 1,
                "batch_size": self.batch_size >= 1,
                "learning_rate": rate is None or rate > 0,
                "n_warmup": self.n_warmup >= 0,
                "decay_share": 0 <= self.decay_share <= 1,
                "aux_weight": self.aux_weight >= 0,
                "dead_after": self.dead_after is None or self.dead_after >= 1,
                "resample_every": self.resample_every >= 0,
                "l0_weight": self.l0_weight >= 0,
                "l1_weight": self.l1_weight >= 0,
                "bandwidth": self.bandwidth > 0,
            }.items()
            if not is_good
        ]
        if faults:
            raise InputError(
                f"training a dictionary: got {', '.join(faults)}, expected at least a step of a "
                "row, shares from 0 to 1, and nothing negative."
            )

    @property
    def n_dead(self) -> int:
        """Rows without activity after which a latent is dead."""
        if self.dead_after is not None:
            return self.dead_after
        return max(min(10**7, self.n_steps * self.batch_size // 50), 1)

    def rate(self, step: int, d_sae: int) -> float:
        """Learning rate of a step, counted from 0."""
        peak = self.learning_rate or 2e-4 / (d_sae / 16384) ** 0.5
        n_warmup = min(self.n_warmup, self.n_steps // 10)
        rise = (step + 1) / (n_warmup + 1)
        n_decay = self.decay_share * self.n_steps
        fall = (self.n_steps - step) / n_decay if n_decay else 1.0
        return peak * min(rise, fall, 1.0)


class DictionaryStep(NamedTuple):
    """What a step saw, before it changed anything; tensors of one number, which nobody waits for.

    Means over the batch's rows.
    """

    fvu: Float[Tensor, ""]
    """Fraction of variance unexplained; of matryoshka, by the whole dictionary."""
    aux: Float[Tensor, ""]
    """Loss of the dead latents."""
    l0: Float[Tensor, ""]
    """Active latents a row."""
    dead: Int[Tensor, ""]
    """Latents that were not active for long."""
    never_positive: Int[Tensor, ""]
    """Those of them whose pre-activation was not even positive: no gradient reaches them."""
    threshold: Float[Tensor, ""]
    """Mean threshold in the rows' own units; NaN without one."""
    learning_rate: float


class DictionaryTrainer:
    """Trains one dictionary of rows that are scaled to a mean square norm of 1.

    Loss: fraction of variance unexplained (of matryoshka, its mean over the prefixes), plus
    ``aux_weight`` times ``dead_latent_loss``; of jumprelu, also ``l0_weight * (L0 / k - 1)^2``, of
    standard ``l1_weight`` times the mean row's sum of ``f |W_dec|``. Directions keep norm 1, unless
    told otherwise: the part of their gradient along them is taken out.
    """

    def __init__(
        self,
        cfg: DictionaryConfig,
        training: DictionaryTraining,
        rows: Float[Tensor, "row d_in"],
        seed: int,
    ) -> None:
        """Begin at step 0.

        Args:
            cfg: shape of the dictionary.
            training: its settings.
            rows: of which centre and scale are taken; the first batch, say.
            seed: of the first directions.

        Raises:
            InputError: rows of another width, without variance or not finite.
        """
        check_rows("beginning to train a dictionary", cfg, rows)
        rows = rows.float()
        size = float(rows.square().sum(-1).mean().sqrt())
        if not (rows - rows[0]).any() or not size:
            raise InputError(
                f"beginning to train a dictionary: got {len(rows)} rows that are all the same, "
                "expected rows that differ. Take another point or other clips."
            )
        self.cfg, self.training, self.scale = cfg, training, 1 / size
        self.sae = SparseAutoencoder.initialised(cfg, rows * self.scale, seed)
        self.n_done = 0
        """Steps that were made."""
        self._quiet = torch.zeros(2, cfg.d_sae, dtype=torch.long, device=rows.device)
        """Rows since each latent was active, and since it was positive."""
        if cfg.architecture == "jumprelu":
            pre = self.sae.pre(rows * self.scale)
            active = batch_top_k(pre, cfg.n_active)
            self.sae.threshold.fill_(pre[active.row, active.latent].min().clamp_min(0.0))
        if not training.is_centred:
            self.sae.b_dec.zero_()
        learnt = {
            "encoder": not training.is_tied,
            "b_enc": True,
            "W_dec": True,
            "b_dec": training.is_centred,
            "threshold": cfg.architecture == "jumprelu",
        }
        self._learnt = {name: getattr(self.sae, name) for name, yes in learnt.items() if yes}
        for parameter in self._learnt.values():
            parameter.requires_grad_(True)
        # A tied one has the gradient of what it is read off.
        self.sae.encoder.requires_grad_(True)
        self._optimizer = torch.optim.Adam([*self._learnt.values()], lr=0.0, fused=True)

    def trained(self) -> SparseAutoencoder:
        """A copy of the dictionary as it stands, for rows in their own units."""
        with torch.no_grad():
            return self.sae.scaled(1 / self.scale)

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        """Latents that were not active for ``training.n_dead`` rows."""
        return self._quiet[0] >= self.training.n_dead

    def step(self, rows: Float[Tensor, "row d_in"]) -> DictionaryStep:
        """Train one step.

        Raises:
            InputError: rows of another width, or not finite.
        """
        check_rows(f"step {self.n_done + 1} of training a dictionary", self.cfg, rows)
        sae, x, training = self.sae, rows.float() * self.scale, self.training
        guess = float(sae.threshold[0]) / 2 if self._has_mean_threshold and self.n_done else 0.0
        made = reconstructed(sae, x, bandwidth=training.bandwidth, above=guess)
        losses = [unexplained(x, part) for part in made.rows]
        dead, aux = self.dead, x.new_zeros(())
        if training.aux_weight:
            residual = (x - made.rows[-1]).detach()
            aux = dead_latent_loss(sae, x, residual, dead, max(self.cfg.d_in // 2, 1))
        loss = torch.stack(losses).mean() + training.aux_weight * aux
        if self.cfg.architecture == "jumprelu":
            loss = loss + training.l0_weight * (made.l0 / self.cfg.n_active - 1).square()
        elif self.cfg.architecture == "standard":
            size = made.value * sae.W_dec.norm(dim=-1)[made.active.latent]
            loss = loss + training.l1_weight * size.sum() / len(x)
        rate = training.rate(self.n_done, self.cfg.d_sae)
        self._descend(loss, rate)
        with torch.no_grad():
            self._watch(made)
            never = dead & (self._quiet[1] >= training.n_dead)
            every = training.resample_every
            if every and (self.n_done + 1) % every == 0:
                self._resample(x - made.rows[-1], never)
        self.n_done += 1
        return DictionaryStep(
            fvu=losses[-1].detach(),
            aux=aux.detach(),
            l0=made.l0.detach(),
            dead=dead.sum(),
            never_positive=never.sum(),
            threshold=sae.threshold.detach().mean() / self.scale,
            learning_rate=rate,
        )

    @property
    def _has_mean_threshold(self) -> bool:
        return self.cfg.architecture in ("batchtopk", "matryoshka")

    def _descend(self, loss: Tensor, rate: float) -> None:
        self.sae.zero_grad(set_to_none=True)
        loss.backward()
        directions, training = self.sae.W_dec, self.training
        with torch.no_grad():
            assert directions.grad is not None
            if training.is_tied and self.sae.encoder.grad is not None:
                directions.grad += self.sae.encoder.grad
            if training.keeps_norms:
                along = (directions.grad * directions).sum(-1, keepdim=True)
                directions.grad -= along * directions
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            if training.keeps_norms:
                directions.copy_(F.normalize(directions, dim=-1))
            if training.is_tied:
                self.sae.encoder.copy_(directions)
            if self.cfg.architecture == "jumprelu":
                self.sae.threshold.clamp_(min=0.0)

    def _watch(self, made: Reconstruction) -> None:
        """Note which latents were active, and move the threshold."""
        quiet, is_on = self._quiet, made.value > 0
        quiet += len(made.pre)
        quiet[0, made.active.latent[is_on]] = 0
        quiet[1] = quiet[1].where(made.pre.amax(0) <= 0, 0)
        if self._has_mean_threshold:
            smallest = torch.where(is_on, made.value, torch.inf).min()
            before = self.sae.threshold
            # The first value begins the mean: from 0 it would be too small for hundreds of steps.
            mean = smallest if not self.n_done else before + THRESHOLD_RATE * (smallest - before)
            before.copy_(torch.where(smallest.isfinite(), mean, before))

    def _resample(
        self,
        residual: Float[Tensor, "row d_in"],
        chosen: Bool[Tensor, " latent"],
    ) -> None:
        """Begin some latents anew in the directions of rows that are badly reconstructed.

        Source: Bricken et al. 2023, "Towards Monosemanticity", neuron resampling: rows are drawn
        by their squared loss, the encoder's rows are a fifth as long as those of the others.
        """
        numbers = chosen.nonzero().flatten().cpu()
        if not len(numbers):
            return
        generator = torch.Generator().manual_seed(self.n_done)
        weight = residual.square().sum(-1).square().double().cpu()
        drawn = weight.multinomial(len(numbers), replacement=True, generator=generator)
        directions = F.normalize(residual[drawn.to(residual.device)], dim=-1)
        at, sae = numbers.to(residual.device), self.sae
        others = sae.encoder[~chosen]
        size = others.norm(dim=-1).mean() if len(others) else directions.new_ones(())
        sae.W_dec[at] = directions
        sae.encoder[at] = directions if self.training.is_tied else 0.2 * size * directions
        sae.b_enc[at] = 0.0
        for parameter in {"W_dec", "encoder", "b_enc"} & self._learnt.keys():
            state = self._optimizer.state[self._learnt[parameter]]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name][at] = 0.0
        self._quiet[:, at] = 0

    # --- Going on later

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, from which another trainer goes on with the same numbers."""
        found = {
            "n_done": torch.tensor(self.n_done),
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "quiet": self._quiet,
        }
        for name, parameter in self.sae.named_parameters():
            found[name] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                found[f"{key}:{name}"] = value
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``, of the same shape and settings.

        Raises:
            InputError: it has other tensors than those of this training.
        """
        expected = {name: tuple(value.shape) for name, value in self.state().items()}
        for name, parameter in self._learnt.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                expected[f"{key}:{name}"] = () if key == "step" else tuple(parameter.shape)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            wrong = sorted(k for k in found | expected if found.get(k) != expected.get(k))
            raise InputError(
                f"resuming the training of a dictionary: got other tensors than this training has "
                f"({len(wrong)} of them, {', '.join(wrong[:3])} first), expected a state of the "
                "same shape and settings. Begin again."
            )
        self.n_done, self.scale = int(state["n_done"]), float(state["scale"])
        with torch.no_grad():
            self._quiet.copy_(state["quiet"])
            for name, parameter in self.sae.named_parameters():
                parameter.copy_(state[name])
        for name, parameter in self._learnt.items():
            self._optimizer.state[parameter] = {
                key: state[f"{key}:{name}"].clone().to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
