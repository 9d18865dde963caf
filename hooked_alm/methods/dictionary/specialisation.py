"""Latents that are active in clips of one domain, such as an emotion, a speaker, or no speech."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ...errors import InputError

SHARE, MIN_CLIPS = 0.9, 10
"""From which share of its clips a latent is of a domain, and of how many clips at least."""
ActiveClips = Bool[np.ndarray, "clip latent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Specialisation:
    """What clips say of each latent's domain."""

    share: Float[np.ndarray, "latent domain"]
    """P(domain | active); NaN of latents that no clip activates."""
    n_clips: Int[np.ndarray, " latent"]
    """Clips in which it is active."""
    domain: Int[np.ndarray, " latent"]
    """The domain that it is of; −1 if of none."""


def specialisation(
    active: ActiveClips,
    domains: Int[np.ndarray, " clip"],
    *,
    share: float = SHARE,
    min_clips: int = MIN_CLIPS,
) -> Specialisation:
    """Which latents are of a domain: active in enough clips, of which nearly all are of it.

    Source: AudioSAE (arXiv 2602.05027) without its thresholds, which are not published; M-SAE-5.

    Args:
        active: whether any frame of a clip activates a latent, or enough of them.
        domains: of each clip, from 0.
        share: of a latent's clips that have to be of one domain.
        min_clips: in which it has to be active.

    Raises:
        InputError: one domain alone, or bounds that cannot be.
    """
    n = int(domains.max()) + 1 if len(domains) else 0
    if len({*domains.tolist()}) < 2:
        raise InputError(
            f"finding specialised latents: got clips of {len({*domains.tolist()})} domain, "
            "expected two or more."
        )
    if not 0.5 < share <= 1 or min_clips < 1:
        raise InputError(
            f"finding specialised latents: got share={share} and min_clips={min_clips}, expected "
            "more than a half, so that no latent is of two domains, and one clip or more."
        )
    counts = np.eye(n)[domains].T @ active
    n_clips = active.sum(axis=0)
    with np.errstate(invalid="ignore"):
        shares = (counts / n_clips).T
    best = np.nan_to_num(shares).argmax(axis=1)
    is_of_one = (n_clips >= min_clips) & (np.nan_to_num(shares).max(axis=1) >= share)
    return Specialisation(
        share=shares, n_clips=n_clips.astype(np.int64), domain=np.where(is_of_one, best, -1)
    )


def specialised_by_chance(
    active: ActiveClips,
    domains: Int[np.ndarray, " clip"],
    *,
    n_draws: int,
    seed: int,
    share: float = SHARE,
    min_clips: int = MIN_CLIPS,
) -> Int[np.ndarray, "draw domain"]:
    """Number of latents of each domain once domains are dealt out to the clips anew.

    Args:
        active: as in ``specialisation``.
        domains: of each clip.
        n_draws: how often they are dealt out.
        seed: of the draws.
        share: as in ``specialisation``.
        min_clips: likewise.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(n_draws):
        dealt = rng.permutation(domains)
        one = specialisation(active, dealt, share=share, min_clips=min_clips)
        found.append(np.bincount(one.domain[one.domain >= 0], minlength=one.share.shape[1]))
    return np.stack(found).astype(np.int64)
