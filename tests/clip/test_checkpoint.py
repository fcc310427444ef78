"""A CLIP in rac3's own form."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from published_clips import TEXTS, VOCABULARY, assert_same, edit

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.images import ClipImages
from rac3.clip.published import load_clip
from rac3.config import InputError
from rac3.tokens.text import TextTokenizer


def test_saved_and_opened(published, tmp_path):
    loaded = load_clip(str(published))
    loaded.save(tmp_path)
    assert_same(ClipCheckpoint.open(tmp_path), loaded)
    assert (loaded.tokenizer.bos, loaded.tokenizer.eos) == (VOCABULARY - 2, VOCABULARY - 1)


def test_a_fitted_clip_is_saved_in_the_same_form(published, tmp_path):
    """Its begin and end of text are the two ids after its tokenizer's."""
    TextTokenizer(vocab_size=260).fit(["a photo of a red cat"] * 3, tmp_path / "fitted")
    tokenizer = TextTokenizer().load(tmp_path / "fitted")
    whole = load_clip(str(published))
    text = replace(whole.config.text_config, vocab_size=262, eos_token_id=261)
    params = unflatten_dict(
        {
            path: leaf[:262] if path[-2:] == ("token_embedding", "embedding") else leaf
            for path, leaf in flatten_dict(whole.params).items()
        }
    )
    images = ClipImages(steps="crop, scale")
    fitted = ClipCheckpoint(replace(whole.config, text_config=text), params, tokenizer, images)
    fitted.save(tmp_path / "artifact")
    shutil.rmtree(tmp_path / "fitted")
    opened = ClipCheckpoint.open(tmp_path / "artifact")
    assert_same(opened, fitted)
    ids, mask = opened.encoder().text(["a red cat"])
    assert ids[mask].tolist() == [260, *tokenizer.encode("a red cat"), 261]
    np.testing.assert_array_equal(opened.encoder().embed_texts(TEXTS), fitted.encoder().embed_texts(TEXTS))
    edit(tmp_path / "artifact" / "config.json", model_type=None)
    with pytest.raises(InputError, match="was written by another version of rac3; delete it"):
        ClipCheckpoint.open(tmp_path / "artifact")
