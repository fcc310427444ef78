"""The text tokenizer: a byte-level BPE fitted on the captions, or any tokenizer that `transformers` loads.

It gives text ids only; `vocabulary.py` adds `<eod>`, the mask sentinels and other specials.
"""

import html
import json
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Bool

from rac3.config import InputError
from rac3.weights.checkpoint_files import checkpoint_folder, content_identity, read_json
from rac3.weights.hub import why_not

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIP_TOKENIZER = ("vocab.json", "merges.txt")  # the format before tokenizer.json
FILES = ("*.json", "*.txt", "*.model")  # vocabularies and settings of published tokenizers
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "config.json")
FITTED_CLASS = "PreTrainedTokenizerFast"  # of transformers, for what `fit` saves
FITTED_CLASSES = (FITTED_CLASS, "TokenizersBackend")  # the same class, under the name that it saves itself with
FITTED_FILES = ("tokenizer.json", "tokenizer_config.json")
FITTED_SETTINGS = {"tokenizer_class": FITTED_CLASS, "clean_up_tokenization_spaces": False}
SENTENCEPIECE = "spiece.model"  # SigLIP's
PUNCTUATION = str.maketrans("", "", string.punctuation)
SPACES = ("\u0120", "\u2581")  # before a word, in the tokens of byte-level BPE and of SentencePiece
CONTINUES, ENDS = "##", "</w>"  # before the rest of a word, in WordPiece; after a word, in CLIP's BPE
Clean = Literal["", "lowercase", "lower", "whitespace", "canonicalize"]
"""What is done to a text before it is tokenized: nothing, lower case, or one of OpenCLIP's ways, under its names."""
CLEANED = get_args(Clean)

BYTES = 256  # every byte is a token, so that any text can be encoded

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
"""Short texts of many kinds, which show what a tokenizer does not preserve."""


@dataclass(frozen=True)
class TextTokenizer:
    """Config of the text tokenizer: `checkpoint` if given, else one fitted with at most `vocab_size` ids."""

    checkpoint: str | None = None  # a folder, or a name on the Hugging Face hub
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        if self.vocab_size < BYTES:
            raise InputError(
                f"text.vocab_size={self.vocab_size} is below {BYTES}, one id per byte; use at least {BYTES}"
            )

    def fit(self, texts: Iterable[str], folder: str | os.PathLike[str]) -> None:
        """Fit a byte-level BPE (arXiv 1508.07909, on bytes as in GPT-2) on `texts` and save it into `folder`.

        Deterministic. Few texts give fewer than `vocab_size` ids. `transformers.AutoTokenizer.from_pretrained` loads
        the folder.
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
        settings = json.dumps(FITTED_SETTINGS, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    def load(self, folder: str | os.PathLike[str] | None = None) -> "Tokenizer":
        """The tokenizer of `checkpoint` if set, else the one that `fit` saved into `folder`.

        Raises:
          InputError: there is no such tokenizer, or `transformers` cannot read it.
        """
        source = self.checkpoint or folder
        if source is None:
            raise InputError("text.checkpoint is not set and there is no folder with a fitted tokenizer; give either")
        return Tokenizer(_load_pretrained(os.fspath(source)))


def cleaned(text: str, clean: Clean) -> str:
    """A text as OpenCLIP's tokenizers read it: mended by ftfy, entities resolved twice, white space collapsed.

    "The fox’s &amp;amp; ﬁre" -> "the fox's & fire" ("lower")
    """
    if clean == "":
        return text
    if clean == "lowercase":
        return text.lower()
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(PUNCTUATION)
    text = " ".join(text.split())
    return text if clean == "whitespace" else text.lower()


class Fitted:
    """What `fit` saved, with as much of transformers' class as `Tokenizer` uses: importing that takes over a second."""

    bos_token = eos_token = unk_token = pad_token = None
    bos_token_id = eos_token_id = unk_token_id = pad_token_id = None
    padding_side = "right"
    added_tokens_decoder: Mapping[int, Any] = {}
    all_special_ids: Sequence[int] = ()

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.files = {name: (folder / name).read_bytes() for name in FITTED_FILES}
        self.bpe = Tokenizer.from_buffer(self.files["tokenizer.json"])

    def get_vocab(self) -> dict[str, int]:
        return self.bpe.get_vocab()

    def encode(self, text: str, **_: Any) -> list[int]:
        return self.bpe.encode(text).ids

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.bpe.decode(ids)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | None]:
        return [self.bpe.id_to_token(i) for i in ids]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (Path(folder) / name).write_bytes(data)


class Tokenizer:
    """A loaded tokenizer: text to ids in [0, size) and back, without special tokens.

    Attributes:
      clean: what is done to a text before.
    """

    def __init__(self, pretrained: "PreTrainedTokenizerBase | Fitted", clean: Clean = "") -> None:
        self._pretrained = pretrained
        self.clean = clean
        # Ids may have gaps, so the number of tokens does not always bound them.
        self.size: int = max(pretrained.get_vocab().values()) + 1
        self.bos: int | None = pretrained.bos_token_id  # begin and end of text, if it has them
        self.eos: int | None = pretrained.eos_token_id
        self.pad: int | None = pretrained.pad_token_id
        self.pads_left: bool = pretrained.padding_side == "left"
        self._controls = _special_ids(pretrained)
        if pretrained.unk_token_id not in (self.bos, self.eos, self.pad):
            self._controls.discard(pretrained.unk_token_id)  # it represents text

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. No text becomes a control id: the characters `</s>` are just characters.

        Drops text that only a control id represents, as `</s>` in Unigram models.
        """
        ids = self._pretrained.encode(
            cleaned(text, self.clean), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [i for i in ids if i not in self._controls]

    def encode_with_specials(self, text: str, max_length: int) -> list[int]:
        """Ids of `text` with the tokenizer's own special tokens, which truncation to `max_length` keeps."""
        before, after = self._added
        return before + self.encode(text)[: max(0, max_length - len(before + after))] + after

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The special ids that the tokenizer adds before a text, and after it."""
        ids = self._pretrained.encode("", add_special_tokens=True, verbose=False)
        return (ids[:1], ids[1:]) if ids and ids[0] == self.bos else ([], ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. With a tokenizer that `fit` made, `decode(encode(text)) == text` for any Unicode text.

        Invalid UTF-8, such as a truncated character, becomes U+FFFD.
        """
        plain = [int(i) for i in ids]
        text = self._pretrained.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def summary(self) -> str:
        """One line: the class, its ids, and which of `PROBES` it does not preserve."""
        own = [f"{name} {i}" for name, i in (("bos", self.bos), ("eos", self.eos)) if i is not None]
        named = (getattr(self._pretrained, f"{name}_token") for name in ("bos", "eos", "unk", "pad"))
        probes = PROBES | {"its own special tokens": " ".join(dict.fromkeys(token for token in named if token))}
        back = {kind: self.decode(self.encode(text)) for kind, text in probes.items()}
        changes = [f"{kind} ({probes[kind]!r} -> {text!r})" for kind, text in back.items() if text != probes[kind]]
        verdict = f"changes {', '.join(changes)}" if changes else f"preserves all {len(probes)} kinds of text tried"
        kind = FITTED_CLASS if isinstance(self._pretrained, Fitted) else type(self._pretrained).__name__
        return f"{kind}, {', '.join([f'{self.size} ids', *own])}; {verdict}"

    @cached_property
    def word_starts(self) -> Bool[np.ndarray, " size"] | None:
        """Whether each id begins a word, by the mark of its token: a space before it, or `##` if it does not.

        None if tokens have no such marks; CLIP's mark where words end.
        """
        tokens = [token or "" for token in self._pretrained.convert_ids_to_tokens(list(range(self.size)))]
        if any(token.endswith(ENDS) for token in tokens):
            return None
        if any(token.startswith(SPACES) for token in tokens):
            return np.array([token.startswith(SPACES) for token in tokens])
        if any(token.startswith(CONTINUES) for token in tokens):
            return np.array([not token.startswith(CONTINUES) for token in tokens])
        return None

    def ids(self) -> dict[str, int]:
        """Every token and its id."""
        return self._pretrained.get_vocab()

    def cleaning(self, clean: Clean) -> "Tokenizer":
        """This tokenizer with what is done to a text before."""
        return Tokenizer(self._pretrained, clean)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `TextTokenizer.load` and `transformers.AutoTokenizer` load."""
        self._pretrained.save_pretrained(folder)


def load_clip_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a CLIP checkpoint: the class that `tokenizer_config.json` names, else `CLIPTokenizer`.

    Raises:
      InputError: the folder has none, or `transformers` cannot read it.
    """
    if not (folder / "tokenizer.json").is_file() and not all((folder / n).is_file() for n in CLIP_TOKENIZER):
        raise InputError(
            f"clip checkpoint {str(folder)!r} has no tokenizer; copy tokenizer.json, or {' and '.join(CLIP_TOKENIZER)},"
            " of the model into it (any model with a vocabulary of 49408 can take openai/clip-vit-base-patch32's)"
        )
    settings = folder / "tokenizer_config.json"
    named = settings.is_file() and "tokenizer_class" in settings.read_text(errors="replace", encoding="utf-8")
    return Tokenizer(_load_pretrained(str(folder), "AutoTokenizer" if named else "CLIPTokenizer"))


def tokenizer_identity(source: str) -> dict[str, Any]:
    """What identifies a published tokenizer in a recipe: its name, or its folder with the content of its files."""
    folder = checkpoint_folder("tokenizer", source)
    if folder is None:
        return {"name": source}
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    return {"folder": str(folder.resolve()), "files": content_identity(files)}


def load_siglip_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a SigLIP checkpoint, as `AutoTokenizer` loads it, with two differences.

    SigLIP 2 was trained on lower-cased text, but `AutoTokenizer` lower-cases for NaFlex checkpoints only; here Gemma's
    tokenizer always does. SigLIP's own tokenizer is a SentencePiece model; a folder that has it only as
    `tokenizer.json` is read without the `sentencepiece` package.

    Raises:
      InputError: the folder has no tokenizer, `transformers` cannot read it, or it cannot pad on the right.
    """
    if not (folder / SENTENCEPIECE).is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"siglip checkpoint {str(folder)!r} has no tokenizer; copy tokenizer.json or {SENTENCEPIECE}, and "
            "tokenizer_config.json of the model into it"
        )
    settings = folder / "tokenizer_config.json"
    own = not settings.is_file() or "SiglipTokenizer" in settings.read_text(errors="replace", encoding="utf-8")
    fast = own and not (folder / SENTENCEPIECE).is_file()
    pretrained = _load_pretrained(str(folder), "PreTrainedTokenizerFast" if fast else "AutoTokenizer")
    tokenizer = Tokenizer(pretrained, "lowercase" if type(pretrained).__name__.startswith("Gemma") else "")
    if tokenizer.pad is None or tokenizer.pads_left:
        raise InputError(
            f"siglip checkpoint {str(folder)!r}: its tokenizer pads "
            f"{'nothing' if tokenizer.pad is None else 'on the left'}, but SigLIP reads texts padded on the right; "
            "set pad_token and padding_side='right' in tokenizer_config.json"
        )
    return tokenizer


def _load_pretrained(source: str, kind: str = "AutoTokenizer") -> "PreTrainedTokenizerBase | Fitted":
    folder = checkpoint_folder("tokenizer", source)
    offline = why_not() if folder is None else None
    local = folder is not None or offline is not None
    fix = "check the hub name and the network, or give a folder"
    settings: dict[str, Any] | None = None
    fitted = False
    if folder is not None:
        fix = (
            "a folder needs tokenizer.json, or the files of its class: vocab.json and merges.txt, or a SentencePiece "
            ".model, which needs pip install 'rac3[siglip]'"
        )
        if not any(path for pattern in FILES for path in folder.glob(pattern)):
            raise InputError(f"tokenizer {source!r} has no tokenizer files ({fix})")
        # The errors of `read_json` name the damaged file; those of transformers do not.
        read = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
        settings = read.get("tokenizer_config.json", {})
        if settings.get("tokenizer_class") in FITTED_CLASSES and "config.json" not in read:
            kind = FITTED_CLASS  # as AutoTokenizer finds too, but it imports torch, if that is installed
            fitted = settings == FITTED_SETTINGS and read.keys() == set(FITTED_FILES)
            fitted = fitted and read["tokenizer.json"].get("added_tokens") == []  # as `fit` saved it
    try:
        loaded: PreTrainedTokenizerBase | Fitted
        loaded = Fitted(Path(source)) if fitted else _by_transformers(source, kind, settings, local)
        Tokenizer(loaded)  # settings of a wrong type may fail only when they are used
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust parsers raise no narrower type, and panic with one that is no Exception
        reason = offline or f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:200]
        raise InputError(f"tokenizer {source!r} cannot be loaded: {reason} ({fix})") from error
    if _special_ids(loaded).issuperset(loaded.get_vocab().values()):  # as transformers loads a missing vocabulary
        raise InputError(f"tokenizer {source!r} has no vocabulary, only special tokens ({fix})")
    return loaded


def _by_transformers(
    source: str, kind: str, settings: Mapping[str, Any] | None, local: bool
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a class of transformers.

    Args:
      settings: the `tokenizer_config.json` of a folder; None asks for that of a name on the hub.
      local: read the hub's files from its cache alone.
    """
    import transformers

    if settings is None:
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        settings = get_tokenizer_config(source)
    custom = settings.get("auto_map")
    if custom and (not isinstance(custom, dict) or "AutoTokenizer" in custom):
        raise InputError(
            f"tokenizer {source!r} needs its own code (auto_map in tokenizer_config.json), which is never run; "
            "give one whose class is part of transformers"
        )
    return getattr(transformers, kind).from_pretrained(source, local_files_only=local, trust_remote_code=False)


def _special_ids(pretrained: "PreTrainedTokenizerBase | Fitted") -> set[int]:
    """Ids that do not represent text: begin, end, padding, unknown, and any other that its files call special."""
    added = {i for i, token in pretrained.added_tokens_decoder.items() if token.special}
    return added | {i for i in pretrained.all_special_ids if i is not None}
