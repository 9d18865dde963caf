"""Published corpora of emotional speech: what the names of their files say.

Each scheme is the corpus' own; labels are its words in lower case. What a name does not say, such
as the words of a sentence, comes from the corpus' tables where it has them.

Sources: RAVDESS (Livingstone and Russo 2018, README of the release), CREMA-D (Cao et al. 2014,
README of the repository), Emo-DB (Burkhardt et al. 2005, the database's page), ESD (Zhou et al.
2021, README of the release), IEMOCAP (Busso et al. 2008, README of the release).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hooked_alm.errors import InputError
from hooked_alm.storage import expanded

from .clips import check_clips, open_clip
from .recordings import Recording, audio_files
from .records import collect

Cells = dict[str, str]
NameReader = Callable[[Path, "CorpusTexts"], Cells]

RAVDESS_EMOTIONS = dict(
    zip(
        ("01", "02", "03", "04", "05", "06", "07", "08"),
        ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"),
        strict=True,
    )
)
RAVDESS_SENTENCES = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}

CREMA_D_EMOTIONS = {
    "ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"
}  # fmt: skip
CREMA_D_LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": ""}
CREMA_D_SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}

EMODB_EMOTIONS = {
    "W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happiness", "T": "sadness",
    "N": "neutral",
}  # fmt: skip
EMODB_SENTENCES = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}

ESD_PARALLEL = 350
"""Sentences that every speaker says with each emotion, in the same order."""
IEMOCAP_EMOTIONS = {
    "ang": "anger", "hap": "happiness", "exc": "excitement", "sad": "sadness", "neu": "neutral",
    "fru": "frustration", "fea": "fear", "sur": "surprise", "dis": "disgust", "oth": "other",
    "xxx": "no agreement",
}  # fmt: skip


class CorpusTexts:
    """Text files of a corpus that say what names do not; each is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: dict[str, dict[str, re.Match[str]]] = {}

    def lines(self, pattern: str, line: re.Pattern[str]) -> Mapping[str, re.Match[str]]:
        """What every line that matches says, by its group ``name``, over all files of a pattern."""
        if pattern not in self._lines:
            found: dict[str, re.Match[str]] = {}
            for file in sorted(self.folder.glob(pattern)):
                if file.name[0] == ".":
                    continue
                for text in file.read_text("utf-8-sig", errors="replace").splitlines():
                    if match := line.match(text):
                        found[match["name"]] = match
            self._lines[pattern] = found
        return self._lines[pattern]


def _matched(pattern: str, path: Path) -> re.Match[str]:
    found = re.fullmatch(pattern, path.stem)
    if found is None:
        raise InputError("its name does not follow the corpus' scheme")
    return found


def _known(table: Mapping[str, str], code: str, what: str) -> str:
    if code not in table:
        raise InputError(f"got {code!r} for the {what}, expected one of {', '.join(table)}")
    return table[code]


def _ravdess(path: Path, tables: CorpusTexts) -> Cells:
    """``03-01-06-01-02-01-12``: modality, channel, emotion, intensity, statement, take, actor."""
    name = _matched(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)", path)
    _, channel, emotion, intensity, statement, take, actor = name.groups()
    return {
        "language": "en",
        "emotion": _known(RAVDESS_EMOTIONS, emotion, "emotion"),
        "intensity": _known({"01": "normal", "02": "strong"}, intensity, "intensity"),
        "speaker": f"actor {actor}",
        "sex": "female" if int(actor) % 2 == 0 else "male",
        "sentence": _known(RAVDESS_SENTENCES, statement, "statement"),
        "take": take,
        "channel": _known({"01": "speech", "02": "song"}, channel, "vocal channel"),
    }


def _crema_d(path: Path, tables: CorpusTexts) -> Cells:
    """``1001_DFA_ANG_XX``: actor, sentence, emotion, level."""
    name = _matched(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z]{2})", path)
    actor, sentence, emotion, level = name.groups()
    return {
        "language": "en",
        "emotion": _known(CREMA_D_EMOTIONS, emotion, "emotion"),
        "intensity": _known(CREMA_D_LEVELS, level, "level"),
        "speaker": actor,
        "sentence": _known(CREMA_D_SENTENCES, sentence, "sentence"),
    }


def _emodb(path: Path, tables: CorpusTexts) -> Cells:
    """``03a01Fa``: speaker, text, emotion (its German initial), take."""
    speaker, text, emotion, take = _matched(r"(\d\d)([ab]\d\d)([A-Z])([a-z])", path).groups()
    return {
        "language": "de",
        "emotion": _known(EMODB_EMOTIONS, emotion, "emotion"),
        "speaker": speaker,
        "sentence": _known(EMODB_SENTENCES, text, "text"),
        "take": take,
    }


_ESD_LINE = re.compile(r"(?P<name>\d{4}_\d{6})\t(?P<text>[^\t]+)\t(?P<emotion>[^\t]+)")


def _esd(path: Path, tables: CorpusTexts) -> Cells:
    """``0011_000351`` in a folder of its emotion: speaker, and number among five times 350."""
    speaker, number = _matched(r"(\d{4})_(\d{6})", path).groups()
    emotions = ("Neutral", "Angry", "Happy", "Sad", "Surprise")
    place = int(number) - 1
    if not 0 <= place < ESD_PARALLEL * len(emotions):
        raise InputError(f"got utterance {number}, expected 000001 to 001750")
    emotion = emotions[place // ESD_PARALLEL]
    folders = {one.name for one in path.parents} & {*emotions}
    if folders - {emotion}:
        raise InputError(f"got it in {', '.join(folders)}, where its number says {emotion}")
    line = tables.lines("**/[0-9][0-9][0-9][0-9].txt", _ESD_LINE).get(path.stem)
    return {
        "language": "zh" if int(speaker) <= 10 else "en",
        "emotion": emotion.lower(),
        "speaker": speaker,
        "sentence": f"sentence {place % ESD_PARALLEL + 1}",
        **({"text": line["text"]} if line else {}),
    }


_IEMOCAP_LINE = re.compile(r"\[[\d.]+ - [\d.]+\]\t(?P<name>\w+)\t(?P<emotion>\w{3})\t")
_IEMOCAP_TEXT = re.compile(r"(?P<name>Ses\w+) \[[\d.]+-[\d.]+\]: (?P<text>.+)")


def _iemocap(path: Path, tables: CorpusTexts) -> Cells:
    """``Ses01F_impro01_M003``: session, dialogue, and who speaks; the label is in EmoEvaluation."""
    name = _matched(r"Ses(\d\d)[FM]_(impro|script)\w+_([FM])\w*\d+", path)
    session, kind, sex = name.groups()
    line = tables.lines("**/EmoEvaluation/*.txt", _IEMOCAP_LINE).get(path.stem)
    if line is None:
        raise InputError(
            "no file of dialog/EmoEvaluation has its label: give the folder that holds these too"
        )
    said = tables.lines("**/transcriptions/*.txt", _IEMOCAP_TEXT).get(path.stem)
    return {
        "language": "en",
        "emotion": _known(IEMOCAP_EMOTIONS, line["emotion"], "emotion"),
        "speaker": f"session {int(session)}, {'female' if sex == 'F' else 'male'}",
        "setting": {"impro": "improvised", "script": "scripted"}[kind],
        **({"text": said["text"]} if said else {}),
    }


CORPORA: dict[str, tuple[str, NameReader]] = {
    "ravdess": ("**/*", _ravdess),
    "crema-d": ("**/*", _crema_d),
    "emodb": ("**/*", _emodb),
    "esd": ("**/*", _esd),
    "iemocap": ("**/sentences/wav/**/*", _iemocap),
}
"""Corpus -> where its recordings are in its folder, and what reads their names."""


def read_corpus(folder: str | Path, corpus: str) -> list[Recording]:
    """The recordings of a published corpus, with what their names say.

    Args:
        folder: of the corpus, or of some of its recordings, at any depth.
        corpus: one of `CORPORA`.

    Raises:
        InputError: no such corpus or folder, or all names that do not follow its scheme.

    Warns:
        UserWarning: files that are no recordings by their names.
    """
    if corpus not in CORPORA:
        raise InputError(
            f"reading a corpus: got {corpus!r}, expected one of {', '.join(CORPORA)}. For another "
            "one, write manifest.csv yourself: path, emotion, language, and what else is known."
        )
    folder = expanded(folder)
    doing = f"reading {corpus} from {folder}"
    where, read = CORPORA[corpus]
    files = audio_files(folder, where)
    if not files:
        raise InputError(
            f"{doing}: got no audio files ({where}), expected the corpus. Check the folder."
        )
    tables = CorpusTexts(folder)

    def opened(path: Path) -> Recording:
        cells = {column: cell for column, cell in read(path, tables).items() if cell}
        return open_clip(Recording, path, path.name, cells)

    named = collect(doing, opened, files, lambda path: str(path.relative_to(folder)))
    return check_clips(doing, named)
