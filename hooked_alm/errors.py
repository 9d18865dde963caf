"""The errors a user can cause. Each message says what was attempted, what came, what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class HookedALMError(ValueError):
    """Base of every error that a user can cause."""


class InputError(HookedALMError):
    """Audio, text, ids, spans or options that cannot be used as given."""


class HookNameError(HookedALMError, KeyError):
    """A hook name that matches nothing, or names a point that cannot fire."""

    # KeyError would print the repr of the message.
    __str__ = ValueError.__str__


class ConversionError(HookedALMError):
    """A checkpoint or its config that does not fit the model it claims to be."""


def nearest(name: str, known: Iterable[str]) -> str:
    """At most three known names that look like one that is not known, for its message."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5)) or "nothing"


def refuse_unknown(attempt: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that nothing takes, with the nearest of those that exist.

    Raises:
        InputError: there are any.
    """
    known = sorted(known)
    if unknown := [f"{name} (nearest: {nearest(name, known)})" for name in {*given} - {*known}]:
        raise InputError(
            f"{attempt}: got {', '.join(sorted(unknown))}, expected options that exist. `help` of "
            "the method lists them."
        )


@contextmanager
def any_failure(kind: type[HookedALMError], attempt: str, advice: str) -> Iterator[None]:
    """Turn whatever the code inside fails with into one of our errors.

    For work of other libraries on files that may hold anything; our own errors pass unchanged.
    """
    try:
        yield
    except HookedALMError:
        raise
    except BaseException as error:
        # A panic in compiled code (tokenizers) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{attempt} ({reason_of(error)}). {advice}") from error


def reason_of(error: BaseException) -> str:
    """Kind and beginning of an error of another library, on one line, for a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
