"""What an index is built anew for, and what only its search."""

from dataclasses import replace

import pytest
from rac3.configs.quickstart import get_config

from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.retriever import Retriever
from rac3.retrieval.scann import Scann
from rac3.stages import recipes


@pytest.mark.parametrize(
    ("retriever", "changed", "is_built_anew"),
    [
        (Scann(), Scann(num_neighbors=20), False),
        (Scann(num_leaves=50), Scann(num_leaves=50, num_leaves_to_search=7, reorder_num_neighbors=40), False),
        (Scann(), Scann(num_leaves=50), True),
        (Scann(), Scann(reorder_dtype="int8"), True),
        (Exact(), Exact(dtype="bfloat16", overscan=4), False),
        (Faiss(factory="IVF8,Flat"), Faiss(factory="IVF8,Flat", search="nprobe=4"), False),
        (Faiss(), Faiss(factory="HNSW32"), True),
        (Scann(), Exact(), True),
    ],
)
def test_an_index_stays_if_only_its_search_changes(retriever: Retriever, changed: Retriever, is_built_anew: bool):
    one, other = (replace(get_config(), retriever=each) for each in (retriever, changed))
    assert (recipes.index(one, "train") != recipes.index(other, "train")) is is_built_anew
    assert recipes.neighbors(one, "train").fingerprint != recipes.neighbors(other, "train").fingerprint
