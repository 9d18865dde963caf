"""Strings and token ids, by the methods that HookedTransformer has for them."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..audio import READABLE_SUFFIXES, UNREADABLE_SUFFIXES
from ..errors import InputError, any_failure
from ..inputs import ALMInput, ModelInput, check_embedded, integers

if TYPE_CHECKING:
    from ..config import HookedALMConfig


_SOUND_FILE = re.compile(
    rf"\.({'|'.join(sorted(READABLE_SUFFIXES | UNREADABLE_SUFFIXES))})\s*$", re.IGNORECASE
)


class TokenMethods:
    """Mixed into ``HookedALM``; owns nothing."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        tokenizer: Any
        prompts: Any
        audio: Any
        encode: Any

    def to_input(
        self,
        value: ModelInput,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> ALMInput:
        """Strings and token ids as an ``ALMInput``; an ``ALMInput`` as it is.

        Args:
            value: a prompt, or several. Ids are a tensor, an array or lists, ``[batch, pos]`` or
                one row ``[pos]``.
            attention_mask: with ids alone: 1 at real positions, 0 at pads.
            prepend_bos: for text; see ``to_tokens``. Ids are taken as they are.
            padding_side: "left", where texts are padded.

        Raises:
            InputError: neither text nor ids, or none at all; the name of a sound file, for an audio
                model; ids with audio placeholders (they would run without their audio); a mask
                beside what has its own; or another padding side.
        """
        _check_padding_side(padding_side)
        is_list = isinstance(value, list) and value != []
        if isinstance(value, Tensor | np.ndarray) or (
            is_list and not any(isinstance(one, str | PurePath) for one in value)
        ):
            return self._encoded(value, attention_mask)
        if attention_mask is not None:
            raise InputError(
                f"running the model on {type(value).__name__}: got an attention_mask, which goes "
                "with ids. Leave it out: pads are known."
            )
        if isinstance(value, ALMInput):
            return value.for_autograd()
        ids, mask = self._padded(value, prepend_bos)
        return self._encoded(ids, mask)

    def _encoded(self, ids: Any, mask: Tensor | None) -> ALMInput:
        prefix = "" if self.audio is None else self.audio.argument_prefix
        arguments = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        x: ALMInput = self.encode(**arguments)
        return x.for_autograd()

    @overload
    def to_tokens(self, text: ALMInput, *args: Any, **options: Any) -> ALMInput: ...
    @overload
    def to_tokens(self, text: str | list[str], *args: Any, **options: Any) -> Tensor: ...
    def to_tokens(
        self,
        text: ALMInput | str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> ALMInput | Tensor:
        """Token ids ``[batch, pos]`` of text, padded on the left; an ``ALMInput`` as it is.

        TransformerLens' ``detect_head`` passes its prompt through here; the audio stays with it.

        Args:
            text: one prompt or several.
            prepend_bos: whether ids begin with the tokenizer's BOS token, once; None leaves it to
                the tokenizer, as `model(text)` does.
            padding_side: "left".
            move_to_device: to the model's device; False leaves the ids on the CPU.
            truncate: keep the first ``cfg.n_ctx`` tokens of longer texts (HookedTransformer does,
                unless told not to).

        Raises:
            InputError: an ``ALMInput`` with pads, which such a tool would count as tokens; no text,
                or text without tokens; the name of a sound file, for an audio model; or a BOS token
                that the tokenizer does not have.
        """
        _check_padding_side(padding_side)
        if isinstance(text, ALMInput):
            if not text.attention_mask.all():
                raise InputError(
                    "taking an ALMInput for tokens: it has pads, which TransformerLens' tools "
                    "would count. Prepare the rows one by one."
                )
            return text
        ids, _ = self._padded(text, prepend_bos, self.cfg.n_ctx if truncate else None)
        return ids.to(self.cfg.device) if move_to_device else ids

    def _padded(
        self, text: Any, prepend_bos: bool | None, longest: int | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Ids of texts and their mask, padded on the left."""
        self._check_texts(text)
        texts, tokenizer = [text] if isinstance(text, str) else text, self._tokenizer()
        with any_failure(InputError, "tokenising text", "Give text that the tokenizer knows."):
            rows = tokenizer(texts)["input_ids"]
        if prepend_bos is not None:
            rows = [self._with_bos(ids, prepend_bos) for ids in rows]
        rows = [ids[:longest] for ids in rows]
        if not all(rows):
            raise InputError(
                f"tokenising text: {texts[rows.index([])]!r} has no tokens. Give a word or more."
            )
        width, pad = max(map(len, rows)), tokenizer.pad_token_id
        if pad is None and any(len(ids) < width for ids in rows):
            raise InputError(
                "tokenising several texts: the tokenizer has no pad token to make them equally "
                "long with. Set its `pad_token`, or give them one by one."
            )
        n_pads = [width - len(ids) for ids in rows]
        padded = [[pad] * n + ids for n, ids in zip(n_pads, rows, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in n_pads]
        found = torch.tensor(padded)
        check_embedded(found, tokenizer, self.cfg.d_vocab)
        return found, torch.tensor(mask)

    def _check_texts(self, text: object) -> None:
        """Refuse what is no text, and, where sound can be heard, the name of a sound file.

        The rule: text that ends in a dot and the suffix of a sound file is its name.
        """
        texts = text if isinstance(text, list) else [text]
        for one in texts:
            named = isinstance(one, PurePath) or (isinstance(one, str) and _SOUND_FILE.search(one))
            if named and self.audio is not None:
                raise InputError(
                    f"reading {str(one)!r} as text: it names a sound file, which would not be "
                    f"heard. Use `model.prepare({str(one)!r}, text)`; if the words are meant, give "
                    "their ids, `model.tokenizer(...)['input_ids']`."
                )
        if not texts or not all(isinstance(one, str) for one in texts):
            cure = " Audio goes in by `prepare`." if self.audio is not None else ""
            if isinstance(text, Mapping):
                cure = " A processor's output goes in by `encode(**output)`."
            raise InputError(
                f"running the model on {type(text).__name__} {str(text)[:40]!r}: expected an "
                "ALMInput, token ids [batch, pos]"
                + (", or text." if self.tokenizer else "; it has no tokenizer for text.")
                + cure
            )

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
        ids = integers(tokens)
        tokenizer = self._tokenizer()
        return tokenizer.batch_decode(ids) if ids.ndim == 2 else tokenizer.decode(ids.reshape(-1))

    def to_str_tokens(
        self,
        text: str | list[str] | ALMInput | Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> list[str] | list[list[str]]:
        """Tokens as texts; a list of such lists for a list of texts.

        Args:
            text: a string, a list of strings, ids ``[pos]`` or ``[1, pos]``, or an ``ALMInput`` of
                one row, whose audio placeholders are tokens like any other.
            prepend_bos: see ``to_tokens``; for text only.
            padding_side: "left"; nothing is padded here.

        Raises:
            InputError: ids or an ``ALMInput`` of several rows.
        """
        _check_padding_side(padding_side)
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
        padding_side: str | None = None,
    ) -> int:
        """Position of a token in a prompt, in the padded row.

        Args:
            single_token: an id, or a string that is one token.
            input: text, ids ``[pos]`` or ``[1, pos]``, or an ``ALMInput`` of one row, whose pads
                are not searched.
            mode: "first" or "last", where there are several.
            prepend_bos: see ``to_tokens``; for text only.
            padding_side: "left"; nothing is padded here.

        Raises:
            InputError: the token is not there, the input has several rows, or an unknown mode.
        """
        _check_padding_side(padding_side)
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


def _check_padding_side(side: str | None) -> None:
    if side not in (None, "left"):
        raise InputError(
            f"padding text: got padding_side={side!r}, expected 'left': new tokens follow the last "
            "column."
        )


def _one_row(ids: Any) -> Int[Tensor, " pos"]:
    """Ids ``[pos]`` of a row of ids, or of an ``ALMInput``."""
    row = ids.tokens if isinstance(ids, ALMInput) else integers(ids)
    if row.ndim > 2 or (row.ndim == 2 and len(row) != 1):
        raise InputError(f"taking tokens for one prompt: got {list(row.shape)}, expected one row.")
    return row.reshape(-1)
