"""The fitted text tokenizer, and what every loaded one promises."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from rac3.config import InputError
from rac3.tokens.text import PROBES, TextTokenizer, Tokenizer

CAPTIONS = ["a photo of a red circle", "a photo of a blue square on grass", "the old lighthouse of Zorvath"] * 4

STRINGS = [
    "",
    " ",
    "  two  spaces, and one at the end ",
    "line\r\nbreaks\n\n\tand tabs",
    "I 'm , don 't . clean !",  # a decoder that cleans up would join these
    "<|endoftext|> </s> <mask:0> [SEP]",  # no text is special
    "日本語 and العربية, mixed",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200d\ufeff\u2028",
    "\x00\x01\x7f\x85",
    "\U0010ffff\ue000",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    TextTokenizer(vocab_size=300).fit(CAPTIONS, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return TextTokenizer().load(folder)


def random_text(rng: random.Random) -> str:
    """Any characters but surrogates; small code points and spaces are frequent."""
    pools = [(0x20, 0x7E), (0x00, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x10FFFF), (0x20, 0x20)]
    return "".join(chr(rng.randint(*rng.choice(pools))) for _ in range(rng.randint(0, 40)))


def test_any_unicode_text_survives(tokenizer):
    rng = random.Random(0)
    for text in STRINGS + CAPTIONS + [random_text(rng) for _ in range(2000)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.size for i in ids)


def test_a_fitted_one_is_what_transformers_makes_of_it(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    rng = random.Random(1)
    texts = [*STRINGS, *PROBES.values(), *(random_text(rng) for _ in range(200))]
    for path in (folder, tmp_path / "new" / "folder"):
        peer = AutoTokenizer.from_pretrained(str(path))
        assert peer.get_vocab() == tokenizer.ids()
        for text in texts:
            ids = peer.encode(text, add_special_tokens=False)
            assert tokenizer.encode(text) == tokenizer.encode_with_specials(text, 10**6) == ids
            assert tokenizer.decode(ids[1:]) == peer.decode(ids[1:], clean_up_tokenization_spaces=False)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.pads_left) == (None, None, None, False)


def test_a_fitted_one_opens_without_transformers(folder, tmp_path):
    """Which takes long to import, and torch longer. So does the copy that CLIP saves."""
    code = f"""
import sys
from rac3.tokens.text import TextTokenizer
TextTokenizer().load({str(folder)!r}).save({str(tmp_path)!r})
TextTokenizer().load({str(tmp_path)!r})
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_copy_that_transformers_saved_opens_without_torch(folder, tmp_path):
    """Under its own name for the class; torch takes longer to import than all else that `rac3 generate` opens."""
    AutoTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path)
    code = f"""
import sys
from rac3.tokens.text import TextTokenizer
TextTokenizer().load({str(tmp_path)!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fitted_on_the_captions(tokenizer):
    assert tokenizer.size == 300
    assert len(tokenizer.encode("a photo of a red circle")) < len("a photo of a red circle") / 2
    assert len(tokenizer.encode("xqxqxq")) == 6  # unseen: one id per byte
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"  # half a character


def test_few_texts_give_fewer_ids(tmp_path):
    TextTokenizer(vocab_size=5000).fit(["aa"], tmp_path)
    tokenizer = TextTokenizer().load(tmp_path)
    assert 256 <= tokenizer.size < 300
    TextTokenizer(vocab_size=256).fit([], tmp_path)
    tokenizer = TextTokenizer().load(tmp_path)
    assert tokenizer.size == 256
    assert tokenizer.decode(tokenizer.encode("日本")) == "日本"


def test_fit_is_deterministic(folder, tmp_path):
    TextTokenizer(vocab_size=300).fit(iter(CAPTIONS), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_folder_is_a_checkpoint(folder, tokenizer):
    again = TextTokenizer(checkpoint=str(folder)).load()
    assert again.size == tokenizer.size
    assert again.encode(STRINGS[2]) == tokenizer.encode(STRINGS[2])


def test_a_checkpoint_goes_before_the_folder_of_a_fitted_one(folder, tmp_path):
    TextTokenizer(vocab_size=260).fit(CAPTIONS, tmp_path)
    assert TextTokenizer(checkpoint=str(folder)).load(tmp_path).size == 300


def test_tokenizer_with_special_tokens(folder, tmp_path):
    """Published tokenizers add special tokens; ours does not. Ids may have gaps."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["zzzz"] = 309
    special = {"id": 301, "content": "<s>", "special": True, "normalized": False}
    data["added_tokens"] = [special | {"single_word": False, "lstrip": False, "rstrip": False}]
    piece = {"id": "<s>", "ids": [301], "tokens": ["<s>"]}
    start = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing", "single": start, "pair": start, "special_tokens": {"<s>": piece}
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}'
    )
    original = AutoTokenizer.from_pretrained(str(tmp_path))
    bos, vocabulary = original.bos_token_id, original.get_vocab()
    assert original.encode("a photo")[0] == bos
    assert max(vocabulary.values()) > len(vocabulary)  # the 302 ids have a gap
    tokenizer = TextTokenizer(checkpoint=str(tmp_path)).load()
    assert tokenizer.size == max(vocabulary.values()) + 1
    ids = tokenizer.encode("a photo")
    assert bos not in ids
    assert tokenizer.decode(ids) == "a photo"
    assert bos not in tokenizer.encode("<s>")


def test_a_fitted_one_that_was_given_a_control_id_keeps_it_out_of_texts(folder, tmp_path):
    """By hand, in the folder that `fit` made."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {"id": 300, "content": "<s>", "special": True, "normalized": False}
    data["added_tokens"] = [special | {"single_word": False, "lstrip": False, "rstrip": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    tokenizer = TextTokenizer().load(tmp_path)
    assert tokenizer.size == 301
    assert 300 not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"


def test_missing_tokenizers_are_one_clear_line(tmp_path):
    for config, folder, message in [
        (TextTokenizer(checkpoint=str(tmp_path / "nowhere")), None, "nowhere' is not a folder"),
        (TextTokenizer(checkpoint="./nowhere"), None, "'./nowhere' is not a folder"),
        (
            TextTokenizer(checkpoint=str(tmp_path / "nowhere" / "deeper")),
            None,
            "nowhere/deeper' is not a folder; give one",
        ),
        (TextTokenizer(), tmp_path, "needs tokenizer.json"),
        (TextTokenizer(), None, r"text\.checkpoint is not set"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            config.load(folder)
        assert "\n" not in str(error.value)


def test_bad_config():
    with pytest.raises(InputError, match="vocab_size=100 is below 256"):
        TextTokenizer(vocab_size=100)


def test_config_does_not_import_transformers():
    heavy = "{'transformers', 'tokenizers'}"
    code = f"import sys; from rac3.tokens.text import *; TextTokenizer(); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data["model"].update(vocab={}, merges=[]), "tokenizer"),
        (lambda data: data["model"].update(merges=[["a", "nothing"]]), "cannot be loaded"),
        (lambda data: data.pop("model"), "cannot be loaded"),
    ],
)
def test_a_damaged_fitted_one_is_one_clear_line(folder, tmp_path, damage, said):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    damage(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(InputError, match=said):
        TextTokenizer().load(tmp_path)
