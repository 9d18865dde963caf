"""Tuned lens: an affine translator per depth before the logit lens (block S-2).

``lens_T(r[k]) = unembed(ln_final(r[k] + W_k r[k] + c_k))`` for k < L; depth L, which is the model's
own output, is left as it is. W and c begin at 0, so that an untrained lens is the logit lens, and
weight decay pulls towards it.

A translator is trained to predict the output. It can read an answer off a depth at which the model
has not settled it: what it shows is what could be decoded there, not what the model uses.

Source: Belrose et al. 2023; the loss, the optimisers and their defaults follow the authors' code
(github.com/AlignmentResearch/tuned-lens, ``scripts/train_loop.py`` and ``scripts/ingredients.py``).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...model import HookedALM
from ...offload import home_of
from .lens import LensNorm, normalised

LensOptimizer = Literal["sgd", "adam"]
TokenRows = Float[Tensor, "depth token d_model"]
"""Residual stream of some tokens at every depth 0..L, as ``residual_rows`` gives it per prompt."""

_HASHED_ROWS = 4096


class TunedLens(nn.Module):
    """Affine translators, one for each depth 0..L−1, in fp32; a ``Lens``."""

    norm: LensNorm = "final"
    """Under which translators are trained."""

    def __init__(self, n_layers: int, d_model: int, *, unembed_sha256: str) -> None:
        """Translators that change nothing.

        Args:
            n_layers: L, the number of blocks on the way to the head.
            d_model: width of the residual stream.
            unembed_sha256: hash of the model's final norm and unembedding; see ``unembed_hash``.
        """
        super().__init__()
        self.translators = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(n_layers))
        self.d_model = d_model
        self.unembed_sha256 = unembed_sha256
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.requires_grad_(False)

    @property
    def n_depths(self) -> int:
        """Depths 0..L of the model that it was trained for."""
        return len(self.translators) + 1

    @classmethod
    def untrained(cls, model: HookedALM) -> "TunedLens":
        """The lens of a model before training: exactly its logit lens."""
        lens = cls(len(model.path), model.cfg.d_model, unembed_sha256=unembed_hash(model))
        return lens.to(home_of(model.head_unembed))

    def translate(
        self, rows: Float[Tensor, "*rows d_model"], depth: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Rows of one depth in fp32, translated; those of depth L are only cast."""
        x = rows.to(home_of(self)).float()
        return x if depth == len(self.translators) else x + self.translators[depth](x)

    def check(self, model: HookedALM) -> None:
        """Refuse a model that the lens was not trained for.

        Raises:
            InputError: another number of blocks, another width, or another unembedding.
        """
        ours = len(self.translators), self.d_model
        theirs = len(model.path), model.cfg.d_model
        what = f"using a tuned lens on {model.cfg.model_name!r}"
        if ours != theirs:
            raise InputError(
                f"{what}: got a lens for {ours[0]} blocks of width {ours[1]}, expected one for "
                f"{theirs[0]} of width {theirs[1]}. Train one on this model."
            )
        if (found := unembed_hash(model)) != self.unembed_sha256:
            raise InputError(
                f"{what}: got a lens for the unembedding {self.unembed_sha256[:12]}…, expected "
                f"{found[:12]}…: it was trained on another model (or this one loaded in another "
                "dtype than its checkpoint's). Train one on this model."
            )


def unembed_hash(model: HookedALM) -> str:
    """SHA-256 of what every lens of a model ends in: final norm, its epsilon, and unembedding.

    The values are hashed in fp32, so that bf16 weights have one hash however they are loaded.
    """
    norm, unembed = model.head_norm, model.head_unembed.directions()
    digest = hashlib.sha256(repr(float(norm.eps)).encode())
    weights = [getattr(norm, name)[None] for name, _ in norm.named_parameters()]
    for part in (*weights, *unembed.split(_HASHED_ROWS)):
        digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class LensTraining:
    """Settings of the training of translators; the defaults are those of the authors' code.

    ``sgd``: Nesterov momentum 0.9, rate 1.0·(1 − 0.9), no warm-up. ``adam``: AMSGrad, rate 1e-3,
    over a warm-up of a fifth of the steps, at most 1000. Both decay linearly to 0.

    Raises:
        InputError: a number of steps, rate, decay or norm that cannot be.
    """

    n_steps: int = 250
    optimizer: LensOptimizer = "sgd"
    learning_rate: float | None = None
    """Highest rate of the schedule; None is the optimiser's own."""
    weight_decay: float = 1e-3
    max_grad_norm: float = 1.0
    """Largest norm of all depths' gradients together; beyond it they are scaled down."""

    def __post_init__(self) -> None:
        """Refuse settings under which nothing would be learnt."""
        rate, decay, norm = self.peak_rate, self.weight_decay, self.max_grad_norm
        if self.n_steps < 1 or not rate > 0 or not decay >= 0 or not norm > 0:
            raise InputError(
                f"training a tuned lens: got {self.n_steps} steps, learning rate {rate}, weight "
                f"decay {decay}, largest gradient norm {norm}; expected at least one step, a "
                "positive rate and norm, and a decay of 0 or more."
            )

    @property
    def peak_rate(self) -> float:
        """Highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.1 if self.optimizer == "sgd" else 1e-3

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = min(self.n_steps // 5, 1000) if self.optimizer == "adam" else 0
        rise = (step + 1) / (warmup + 1)
        fall = (self.n_steps - step) / (self.n_steps - warmup)
        return self.peak_rate * min(rise, fall)


@dataclass(frozen=True, kw_only=True)
class LensStep:
    """Loss and gradient of a training step, before it changed anything."""

    kl: Float[Tensor, " translator"]
    """Mean KL(output || lens) over the step's tokens at depths 0..L−1, in nats."""
    grad_norm: float
    """Norm of the gradients of all depths together, before clipping."""
    learning_rate: float
    n_tokens: int


class LensTrainer:
    """Trains the translators of a frozen model, a step at a time.

    The loss is the mean over tokens of KL(output || lens), added over depths; the depths share
    nothing but the clipping of the gradient. Nothing larger than ``chunk`` tokens × vocabulary is
    ever held, at one depth at a time.
    """

    def __init__(
        self, model: HookedALM, lens: TunedLens, training: LensTraining, *, chunk: int = 128
    ) -> None:
        """Begin at step 0.

        Args:
            model: the model whose norm and unembedding end the lens; it is not changed.
            lens: trained in place.
            training: optimiser and schedule.
            chunk: tokens of the vocabulary-sized tensors held at once.
        """
        lens.check(model)
        self.model, self.lens, self.training, self.chunk = model, lens, training, chunk
        self.n_done = 0
        """Number of steps that were made."""
        # Cast once, not for every chunk.
        self._weight = model.head_unembed.directions().detach().float()
        parameters = list(lens.requires_grad_(True).parameters())
        decay = training.weight_decay
        self._optimizer: torch.optim.Optimizer
        if training.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(
                parameters, lr=0.0, momentum=0.9, nesterov=True, weight_decay=decay
            )
        else:
            self._optimizer = torch.optim.Adam(parameters, lr=0.0, amsgrad=True, weight_decay=decay)

    def step(self, batches: Iterable[TokenRows]) -> LensStep:
        """Train one step on the tokens of some batches, each of any number of tokens.

        Raises:
            InputError: no tokens, or the loss is no longer finite.
        """
        self._optimizer.zero_grad(set_to_none=True)
        total, n_tokens = torch.zeros(len(self.lens.translators), dtype=torch.float64), 0
        for rows in batches:
            total += self._add_gradients(rows)
            n_tokens += rows.shape[1]
        if not n_tokens or not torch.isfinite(total).all():
            raise InputError(
                f"step {self.n_done + 1} of training a tuned lens: got {n_tokens} tokens and a KL "
                f"by depth of {total.tolist()}, expected tokens and finite numbers. Lower the "
                "learning rate if training diverged; else check what the model makes of the "
                "prompts."
            )
        parameters = list(self.lens.parameters())
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= n_tokens
        norm = nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
        rate = self.training.rate(self.n_done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.n_done += 1
        return LensStep(
            kl=total / n_tokens, grad_norm=float(norm), learning_rate=rate, n_tokens=n_tokens
        )

    def _add_gradients(self, rows: TokenRows) -> Float[Tensor, " translator"]:
        """Add the gradients of the summed KL; returns that sum by depth."""
        total = torch.zeros(len(self.lens.translators), dtype=torch.float64)
        for part in rows.split(self.chunk, dim=1):
            target = self._log_probs(part[-1]).detach()
            for depth in range(len(total)):
                log_p = self._log_probs(self.lens.translate(part[depth], depth))
                kl = F.kl_div(log_p, target, reduction="sum", log_target=True)
                kl.backward()
                total[depth] += float(kl.detach())
        return total

    def _log_probs(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
        return F.linear(normalised(self.model, rows), self._weight).log_softmax(-1)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, from which another trainer goes on with the same numbers."""
        found = {"n_done": torch.tensor(self.n_done)}
        for name, parameter in self.lens.named_parameters():
            found[name] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    found[f"{key}:{name}"] = value
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``, of the same model and settings.

        Raises:
            InputError: it has other tensors than those of this training.
        """
        per_parameter = {"sgd": ("momentum_buffer",)}.get(
            self.training.optimizer, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        )
        parameters = dict(self.lens.named_parameters())
        expected = {"n_done": ()} | {n: tuple(p.shape) for n, p in parameters.items()}
        for name, parameter in parameters.items():
            for key in per_parameter:
                expected[f"{key}:{name}"] = () if key == "step" else tuple(parameter.shape)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            wrong = sorted(k for k in found | expected if found.get(k) != expected.get(k))
            raise InputError(
                f"resuming the training of a tuned lens: got other tensors than this training has "
                f"({len(wrong)} of them, {', '.join(wrong[:3])} first), expected a state of the "
                "same model and settings. Begin again."
            )
        self.n_done = int(state["n_done"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
                kept = {key: state[f"{key}:{name}"].clone() for key in per_parameter}
                self._optimizer.state[parameter] = {
                    # Adam counts its steps on the CPU, wherever the parameters are.
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in kept.items()
                }
