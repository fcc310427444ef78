"""The text tokenizer: a byte-level BPE fitted on the captions, or any tokenizer that `transformers` loads.

It has text ids only; `<eod>`, sentinels and the like are rac3's own, see `vocabulary.py`.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac3.config import InputError
from rac3.weights.checkpoint_files import checkpoint_folder, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIP_TOKENIZER = ("vocab.json", "merges.txt")  # before there was tokenizer.json
FILES = ("*.json", "*.txt", "*.model")  # where published tokenizers have their vocabularies and settings
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "config.json")
SENTENCEPIECE = "spiece.model"  # SigLIP's
BYTES = 256  # every byte is a token, so that any text can be written

PROBES = {
    "capitals": "A Red FOX",
    "spaces": "  two  spaces, and at the end ",
    "line breaks": "one\r\ntwo\n\n\tthree",
    "punctuation": "I 'm , don 't : $4.50 (50%) “fox”",
    "composed accents": "naïve Ångström",
    "combining accents": "cafe\u0301 a\u0327\u0302",
    "Greek and Cyrillic": "αλεπού лиса",
    "Hebrew and Arabic": "שועל ثَعلب",
    "Devanagari and Thai": "लोमड़ी สุนัข",
    "Han, Kana and Hangul": "狐狸 キツネ 여우",
    "emoji": "\U0001f98a \U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "control characters": "a\x00b\x07c\x7f",
    "markup": "</s> <|endoftext|> <unk> [SEP]",
}
"""Short texts of many kinds, to see what a tokenizer does not give back."""


@dataclass(frozen=True)
class TextTokenizer:
    """Which tokenizer: `checkpoint` if given, else one that is fitted to `vocab_size` ids at most."""

    checkpoint: str | None = None  # a folder, or a name on the Hugging Face hub
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        if self.vocab_size < BYTES:
            raise InputError(
                f"text.vocab_size={self.vocab_size} is below {BYTES}, one id per byte; use at least {BYTES}"
            )

    def fit(self, texts: Iterable[str], folder: str | os.PathLike[str]) -> None:
        """Fit a byte-level BPE (arXiv 1508.07909, on bytes as in GPT-2) on `texts` and save it into `folder`.

        The same texts give the same files. Few texts give fewer than `vocab_size` ids. The folder is one that
        `transformers.AutoTokenizer.from_pretrained` loads.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=[], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        bpe.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def load(self, folder: str | os.PathLike[str] | None = None) -> "Tokenizer":
        """The tokenizer of `checkpoint` if that is set, else the one that `fit` saved into `folder`.

        Raises:
          InputError: there is no such tokenizer, or `transformers` cannot read it.
        """
        source = self.checkpoint or folder
        if source is None:
            raise InputError("text.checkpoint is not set and no folder of a fitted tokenizer is given; give either")
        return Tokenizer(_load_pretrained(os.fspath(source)))


class Tokenizer:
    """A loaded tokenizer: text to ids in [0, size) and back, without added special tokens."""

    def __init__(self, pretrained: "PreTrainedTokenizerBase", lowercase: bool = False) -> None:
        self._pretrained = pretrained
        self._lowercase = lowercase
        # ids may have gaps, so the number of tokens is not always the bound of their ids
        self.size: int = max(pretrained.get_vocab().values()) + 1
        self.bos: int | None = pretrained.bos_token_id  # begin and end of text, if it has such ids of its own
        self.eos: int | None = pretrained.eos_token_id
        self.pad: int | None = pretrained.pad_token_id
        self.pads_left: bool = pretrained.padding_side == "left"
        self._controls = _special_ids(pretrained)
        if pretrained.unk_token_id not in (self.bos, self.eos, self.pad):
            self._controls.discard(pretrained.unk_token_id)  # it stands for text

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which the characters `</s>` are characters: no text becomes a control id.

        What a tokenizer has no other ids for is left out, as `</s>` in Unigram models, which know it as a word only.
        """
        ids = self._pretrained.encode(
            self._cased(text), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [i for i in ids if i not in self._controls]

    def encode_with_specials(self, text: str, max_length: int) -> list[int]:
        """With the special tokens that the tokenizer itself adds, of which none is lost where the text is cut."""
        before, after = self._added
        return before + self.encode(text)[: max(0, max_length - len(before + after))] + after

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The special ids that the tokenizer puts before a text, and behind it."""
        ids = self._pretrained.encode("", add_special_tokens=True, verbose=False)
        return (ids[:1], ids[1:]) if ids and ids[0] == self.bos else ([], ids)

    def _cased(self, text: str) -> str:
        return text.lower() if self._lowercase else text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: for a tokenizer that `fit` made, `decode(encode(text)) == text` for any Unicode text.

        Bytes that are not valid UTF-8, as when a character is cut, become U+FFFD.
        """
        plain = [int(i) for i in ids]
        text = self._pretrained.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def summary(self) -> str:
        """One line: the class, its ids, and which of `PROBES` come back otherwise than they went in."""
        own = [f"{name} {i}" for name, i in (("bos", self.bos), ("eos", self.eos)) if i is not None]
        named = (getattr(self._pretrained, f"{name}_token") for name in ("bos", "eos", "unk", "pad"))
        probes = PROBES | {"its own special tokens": " ".join(dict.fromkeys(token for token in named if token))}
        back = {kind: self.decode(self.encode(text)) for kind, text in probes.items()}
        changes = [f"{kind} ({probes[kind]!r} -> {text!r})" for kind, text in back.items() if text != probes[kind]]
        verdict = f"changes {', '.join(changes)}" if changes else f"gives back all {len(probes)} kinds of text tried"
        return f"{type(self._pretrained).__name__}, {', '.join([f'{self.size} ids', *own])}; {verdict}"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `TextTokenizer.load` and `transformers.AutoTokenizer` load."""
        self._pretrained.save_pretrained(folder)


def load_clip_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a CLIP checkpoint: the class that `tokenizer_config.json` names, else `CLIPTokenizer`.

    Raises:
      InputError: the folder has none, or `transformers` cannot read it.
    """
    if not (folder / "tokenizer.json").is_file() and not all((folder / n).is_file() for n in CLIP_TOKENIZER):
        raise InputError(
            f"clip checkpoint {str(folder)!r} has no tokenizer; copy tokenizer.json, or {' and '.join(CLIP_TOKENIZER)},"
            " of the model into it (those of openai/clip-vit-base-patch32 for all with the vocabulary of 49408)"
        )
    settings = folder / "tokenizer_config.json"
    named = settings.is_file() and "tokenizer_class" in settings.read_text(errors="replace")
    return Tokenizer(_load_pretrained(str(folder), "AutoTokenizer" if named else "CLIPTokenizer"))


def tokenizer_identity(source: str) -> dict[str, Any]:
    """What an artifact that is made with a published tokenizer depends on: its name; of a folder, its files' sizes."""
    folder = checkpoint_folder("tokenizer", source)
    if folder is None:
        return {"name": source}
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    return {"folder": str(folder.resolve()), "files": {path.name: path.stat().st_size for path in files}}


def load_siglip_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a SigLIP checkpoint, as `AutoTokenizer` loads it, but for two cases.

    SigLIP 2 was trained on lower-cased text. `AutoTokenizer` lowers the case for NaFlex checkpoints alone; here Gemma's
    tokenizer reads lower case in every SigLIP. And SigLIP's own tokenizer is SentencePiece's; a folder that has it as
    `tokenizer.json` only is read from there, and the `sentencepiece` package is not needed.

    Raises:
      InputError: the folder has none, `transformers` cannot read it, or it cannot pad on the right.
    """
    if not (folder / SENTENCEPIECE).is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"siglip checkpoint {str(folder)!r} has no tokenizer; copy tokenizer.json or {SENTENCEPIECE}, and "
            "tokenizer_config.json, of the model into it"
        )
    settings = folder / "tokenizer_config.json"
    own = not settings.is_file() or "SiglipTokenizer" in settings.read_text(errors="replace")
    fast = own and not (folder / SENTENCEPIECE).is_file()
    pretrained = _load_pretrained(str(folder), "PreTrainedTokenizerFast" if fast else "AutoTokenizer")
    tokenizer = Tokenizer(pretrained, lowercase=type(pretrained).__name__.startswith("Gemma"))
    if tokenizer.pad is None or tokenizer.pads_left:
        raise InputError(
            f"siglip checkpoint {str(folder)!r}: its tokenizer pads "
            f"{'nothing' if tokenizer.pad is None else 'on the left'}, but SigLIP reads texts that are padded on the "
            "right; set pad_token and padding_side='right' in tokenizer_config.json"
        )
    return tokenizer


def _load_pretrained(source: str, kind: str = "AutoTokenizer") -> "PreTrainedTokenizerBase":
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = checkpoint_folder("tokenizer", source)
    local = folder is not None
    fix = "check the hub name and the network, or give a folder"
    if folder is not None:
        fix = (
            "a folder needs tokenizer.json, or what its class reads: vocab.json and merges.txt, or a SentencePiece "
            ".model, for which pip install 'rac3[siglip]'"
        )
        if not any(path for pattern in FILES for path in folder.glob(pattern)):
            raise InputError(f"tokenizer {source!r} has no files of a tokenizer ({fix})")
        for path in (folder / name for name in JSON_FILES):
            if path.is_file():
                read_json(path)  # names the file that is damaged, which transformers does not
    try:
        custom = get_tokenizer_config(source, local_files_only=local).get("auto_map")
        if custom and (not isinstance(custom, dict) or "AutoTokenizer" in custom):
            raise InputError(
                f"tokenizer {source!r} is code of its own (auto_map in tokenizer_config.json), which is not run; give "
                "one of a class that transformers has"
            )
        loaded = getattr(transformers, kind).from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # the parsers in Rust raise no narrower type
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise InputError(f"tokenizer {source!r} cannot be loaded: {reason} ({fix})") from error
    if _special_ids(loaded).issuperset(loaded.get_vocab().values()):  # what transformers makes of a missing vocabulary
        raise InputError(f"tokenizer {source!r} has no vocabulary, only special tokens ({fix})")
    return loaded


def _special_ids(pretrained: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that are no text: begin, end, padding, unknown, and what else its files call special."""
    added = {i for i, token in pretrained.added_tokens_decoder.items() if token.special}
    return added | {i for i in pretrained.all_special_ids if i is not None}
