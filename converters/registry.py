"""Registry of families by architecture name."""

from importlib import import_module
from pathlib import Path
from typing import Any

from hooked_alm.errors import ConversionError

from .family import Family

FAMILIES = {
    "Qwen2AudioForConditionalGeneration": "qwen2_audio",
    "Qwen3ASRForConditionalGeneration": "qwen3_asr",
    "MoonshotKimiaForCausalLM": "kimi_audio",
    "Qwen2_5OmniModel": "qwen2_5_omni",
    "Qwen2_5OmniForConditionalGeneration": "qwen2_5_omni",
    "Qwen2_5OmniThinkerForConditionalGeneration": "qwen2_5_omni",
    "StepAudio2ForCausalLM": "step_audio_2",
    "QWenLMHeadModel": "qwen_audio",
    "MiMoAudioModel": "mimo_audio",
    "MiMoAudioForCausalLM": "mimo_audio",
    "SALMONN": "salmonn",
    "GraniteSpeechForConditionalGeneration": "granite_speech",
    "AudioFlamingo3ForConditionalGeneration": "audio_flamingo_3",
    "MusicFlamingoForConditionalGeneration": "music_flamingo",
    "VoxtralForConditionalGeneration": "voxtral",
    "GlmAsrForConditionalGeneration": "glm_asr",
    "UltravoxModel": "ultravox",
    "ultravox": "ultravox",
    "OmniSpeech2SLlamaForCausalLM": "llama_omni",
    "OmniSpeechLlamaForCausalLM": "llama_omni",
    "DestaModel": "desta2",
    "DeSTA25AudioModel": "desta2_5",
    "desta25": "desta2_5",
    "WhisperForConditionalGeneration": "whisper",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
"""Architecture, as ``config.json`` names it -> module of ``families``."""

_EXPERTS = ("Qwen3-Omni", "its blocks are mixtures of experts, which have no hook points here")
_PHI = (
    "Phi-4-multimodal",
    "its speech adapter is on for prompts with audio alone, and its rotary positions turn a part "
    "of each head by frequencies that depend on the prompt's length",
)
REFUSED: dict[str, tuple[str, str]] = {
    "Qwen3OmniMoeForConditionalGeneration": _EXPERTS,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _EXPERTS,
    "Phi4MultimodalForCausalLM": _PHI,
    "Phi4MMForCausalLM": _PHI,
}
"""Architecture -> what it is, and why it is not supported."""


MODEL_TYPES = {
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "glmasr": "GlmAsrForConditionalGeneration",
    "granite_speech": "GraniteSpeechForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "musicflamingo": "MusicFlamingoForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_asr": "Qwen3ASRForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
}
"""Architecture of a ``config.json`` that has a ``model_type`` of transformers alone."""


def architectures_of(published: dict[str, Any], folder: Path) -> list[str]:
    """Class names in a config, or else the one of its ``model_type``, or that type; never none.

    Raises:
        ConversionError: neither names anything.
    """
    names, kind = published.get("architectures"), published.get("model_type")
    if names and isinstance(names, str):
        names = [names]
    if not names and isinstance(kind, str):
        names = [MODEL_TYPES.get(kind, kind)]
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise ConversionError(
            f"loading {folder}: its config.json has architectures = {names!r:.60} and model_type = "
            f"{kind!r:.60}, expected the name of a class."
        )
    return names


def family_of(published: dict[str, Any], folder: Path) -> Family:
    """The family that answers to the architecture.

    Raises:
        ConversionError: no family answers to it, or the model is one that is refused.
    """
    names = architectures_of(published, folder)
    for name in names:
        if name in FAMILIES:
            return load_family(FAMILIES[name])
        if name in REFUSED:
            what, why = REFUSED[name]
            raise ConversionError(f"loading {folder}: {what} is not supported, because {why}.")
    raise ConversionError(
        f"loading {folder}: architecture {', '.join(names)} is not supported. "
        f"Supported: {', '.join(sorted(FAMILIES))}."
    )


def load_family(module: str) -> Family:
    """A family, by the name of its module."""
    family: Family = import_module(f".families.{module}", __package__).FAMILY
    return family
