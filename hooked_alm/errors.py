"""The errors a user can cause. Each message says what was attempted, what came, what to do."""


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
