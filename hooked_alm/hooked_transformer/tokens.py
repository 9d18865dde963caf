"""Strings and token ids, by the methods that HookedTransformer has for them."""

from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from ..inputs import ALMInput

if TYPE_CHECKING:
    from ..config import HookedALMConfig


class TokenMethods:
    """Mixed into ``HookedALM``; owns nothing."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        tokenizer: Any
        prompts: Any

    @overload
    def to_tokens(self, text: ALMInput, prepend_bos: bool | None = ...) -> ALMInput: ...
    @overload
    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = ...) -> Tensor: ...
    def to_tokens(
        self, text: ALMInput | str | list[str], prepend_bos: bool | None = None
    ) -> ALMInput | Tensor:
        """Token ids ``[batch, pos]`` of text, padded on the left; an ``ALMInput`` as it is.

        TransformerLens' ``detect_head`` passes its prompt through here; the audio stays with it.

        Args:
            text: one prompt or several.
            prepend_bos: whether ids begin with the tokenizer's BOS token, once; None leaves it to
                the tokenizer, as `model(text)` does.

        Raises:
            InputError: an ``ALMInput`` with pads, which such a tool would count as tokens, or a BOS
                token that the tokenizer does not have.
        """
        if isinstance(text, ALMInput):
            if not text.attention_mask.all():
                raise InputError(
                    "taking an ALMInput for tokens: it has pads, which TransformerLens' tools "
                    "would count. Prepare the rows one by one."
                )
            return text
        tokenizer = self._tokenizer()
        rows = tokenizer([text] if isinstance(text, str) else list(text))["input_ids"]
        if prepend_bos is not None:
            rows = [self._with_bos(ids, prepend_bos) for ids in rows]
        batch = {"input_ids": rows}
        if len(rows) > 1:
            batch = tokenizer.pad(batch, padding_side="left")
        return torch.tensor(batch["input_ids"], device=self.cfg.device, dtype=torch.long)

    def _with_bos(self, ids: list[int], wanted: bool) -> list[int]:
        bos = self._tokenizer().bos_token_id
        if bos is None and wanted:
            raise InputError(
                f"prepending a BOS token: the tokenizer of {self.cfg.model_name!r} has none. Leave "
                "prepend_bos out, or use False."
            )
        has_bos = bos is not None and ids[:1] == [bos]
        if has_bos == wanted:
            return ids
        return [bos, *ids] if wanted else ids[1:]

    def to_string(self, tokens: Any) -> Any:
        """Text of ids ``[pos]``, or a list of texts of ids ``[batch, pos]``."""
        ids = torch.as_tensor(tokens)
        tokenizer = self._tokenizer()
        return tokenizer.batch_decode(ids) if ids.ndim == 2 else tokenizer.decode(ids.reshape(-1))

    def to_str_tokens(
        self, text: str | list[str] | ALMInput | Any, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Tokens as texts; a list of such lists for a list of texts.

        Args:
            text: a string, a list of strings, ids ``[pos]`` or ``[1, pos]``, or an ``ALMInput`` of
                one row, whose audio placeholders are tokens like any other.
            prepend_bos: see ``to_tokens``; for text only.

        Raises:
            InputError: ids or an ``ALMInput`` of several rows.
        """
        if isinstance(text, list) and text and isinstance(text[0], str):
            return [self._str_tokens(self.to_tokens(one, prepend_bos)) for one in text]
        return self._str_tokens(
            self.to_tokens(text, prepend_bos) if isinstance(text, str) else text
        )

    def _str_tokens(self, ids: Any) -> list[str]:
        return self._tokenizer().batch_decode(_one_row(ids)[:, None])

    def to_single_str_token(self, token: int) -> str:
        """The text of one id."""
        return self._str_tokens([token])[0]

    def to_single_token(self, text: str) -> int:
        """The id of a string that is exactly one token.

        Raises:
            InputError: it is several, or none.
        """
        ids = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(
                f"looking up the token {text!r}: the tokenizer makes {len(ids)} of it, expected "
                "one. A leading space often counts."
            )
        return int(ids[0])

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | ALMInput | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Position of a token in a prompt, in the padded row.

        Args:
            single_token: an id, or a string that is one token.
            input: text, ids ``[pos]`` or ``[1, pos]``, or an ``ALMInput`` of one row, whose pads
                are not searched.
            mode: "first" or "last", where there are several.
            prepend_bos: see ``to_tokens``; for text only.

        Raises:
            InputError: the token is not there, the input has several rows, or an unknown mode.
        """
        if mode not in ("first", "last"):
            raise InputError(f"locating a token: got mode={mode!r}, expected first or last.")
        wanted = (
            self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        )
        ids = _one_row(self.to_tokens(input, prepend_bos) if isinstance(input, str) else input)
        where = ids == int(wanted)
        if isinstance(input, ALMInput):
            where = where & input.attention_mask[0].bool()
        if not where.any():
            raise InputError(
                f"locating the token {single_token!r} (id {int(wanted)}): none of the "
                f"{len(ids)} positions holds it."
            )
        return int(where.nonzero()[0 if mode == "first" else -1])

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str = "left") -> None:
        """Give strings a tokenizer, for a folder that has none.

        Raises:
            InputError: it has more tokens than the model, another padding side than left, or the
                model has processor files, whose prompts are made with their own tokenizer.
        """
        if self.prompts is not None:
            raise InputError(
                f"setting a tokenizer: {self.cfg.model_name!r} came with processor files, and its "
                "prompts and spans are made with theirs. Change the files instead."
            )
        if default_padding_side != "left":
            raise InputError(
                f"setting a tokenizer: got default_padding_side={default_padding_side!r}, expected "
                "left: batches are padded there."
            )
        if len(tokenizer) > self.cfg.d_vocab:
            raise InputError(
                f"setting a tokenizer: it has {len(tokenizer)} tokens, the model has "
                f"{self.cfg.d_vocab}."
            )
        self.tokenizer = tokenizer

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(
                f"tokenising text for {self.cfg.model_name!r}: its folder has no tokenizer. Pass "
                "token ids, or give it one with `set_tokenizer`."
            )
        return self.tokenizer


def _one_row(ids: Any) -> Int[Tensor, " pos"]:
    """Ids ``[pos]`` of a row of ids, or of an ``ALMInput``."""
    row = ids.tokens if isinstance(ids, ALMInput) else torch.as_tensor(ids)
    if row.ndim > 2 or (row.ndim == 2 and len(row) != 1):
        raise InputError(f"taking tokens for one prompt: got {list(row.shape)}, expected one row.")
    return row.reshape(-1)
