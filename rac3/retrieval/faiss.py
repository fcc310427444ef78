"""Maximum inner product search with FAISS on CPU: any index that its factory can build."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Queries, check_num_neighbors, no_candidates, ranked, search_only

_FILE = "index.faiss"
_BLOCK = 65_536  # documents added at once
_KEEP_VECTORS = ("IndexFlat", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat", "IndexRefineFlat")


@dataclass(frozen=True)
class Faiss:
    """An index given by its factory string: "Flat" (brute force), "HNSW32", "IVF4096,Flat", "OPQ64,IVF16384,PQ64", ...

    `search` sets search parameters in the syntax of FAISS's ParameterSpace, separated by commas: "nprobe=16" for IVF,
    "efSearch=64" for HNSW. It does not affect the build.

    A build holds one index in host memory, and a sample of the embeddings to train it on. An open index is mapped from
    its file. Scores are float32 inner products: an index of full vectors gives them; for an index of codes (PQ, SQ,
    ...), the first `reorder_num_neighbors` are rescored with the embeddings of the part.

    Reference: Douze et al., The Faiss library (arXiv 2401.08281).
    """

    num_neighbors: int = search_only(16)
    factory: str = "Flat"
    search: str = search_only("")
    reorder_num_neighbors: int = search_only(128)  # candidates by code that get exact scores
    seed: int = 0  # of the sample that trains the index

    def __post_init__(self) -> None:
        check_num_neighbors(self.num_neighbors)
        if self.reorder_num_neighbors < self.num_neighbors:
            raise InputError(
                f"retriever.reorder_num_neighbors={self.reorder_num_neighbors} is below "
                f"retriever.num_neighbors={self.num_neighbors}; use at least that, about 8 times as many"
            )
        if self.seed < 0:
            raise InputError(f"retriever.seed={self.seed} is negative; use 0 or more")

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write the index; nothing for an empty part.

        Raises:
          InputError: FAISS cannot build or train the index or set `search`, or it is not installed.
        """
        if len(part) == 0:
            return
        faiss = _import_faiss()
        try:
            index = faiss.index_factory(part.embed_dim, self.factory, faiss.METRIC_INNER_PRODUCT)
            self._set_search(index)
            if not index.is_trained:
                index.train(part.read(self._training_rows(len(part), index)))
            for start in range(0, len(part), _BLOCK):
                index.add(part.read(slice(start, min(start + _BLOCK, len(part)))))
        except RuntimeError as error:
            raise InputError(
                f"retriever.factory={self.factory!r} for {len(part)} documents of width {part.embed_dim}: FAISS says "
                f"{_reason(error)!r}; use another factory string, such as Flat"
            ) from error
        faiss.write_index(index, str(folder / _FILE))

    def open(self, part: MemoryPart, folder: Path) -> "FaissIndex":
        """Raises InputError: the index has no such parameter as `search` sets, or FAISS is not installed."""
        if len(part) == 0:
            return FaissIndex(self, part, None, True)
        faiss = _import_faiss()
        index = faiss.read_index(str(folder / _FILE), faiss.IO_FLAG_MMAP_IFC)
        self._set_search(index)
        return FaissIndex(self, part, index, type(faiss.downcast_index(index)).__name__ in _KEEP_VECTORS)

    def effort(self, documents: int) -> str:
        """What decides how much of the index a query visits; FAISS probes one cell unless told otherwise."""
        usual = "nprobe=1" if "IVF" in self.factory else "efSearch=16" if "HNSW" in self.factory else ""
        return f"retriever.search={self.search or usual!r}" if usual else ""

    def efforts(self, documents: int) -> dict[str, "Faiss"]:
        """Cells to probe (IVF) or graph candidates to visit (HNSW), doubling; none for other indexes."""
        knob = "nprobe" if "IVF" in self.factory else "efSearch" if "HNSW" in self.factory else None
        if knob is None:
            return {}
        others = [each for each in self.search.split(",") if each and not each.startswith(f"{knob}=")]
        settings = [",".join([f"{knob}={2**step}", *others]) for step in range(0, 9)]
        return {setting: replace(self, search=setting) for setting in settings}

    def _set_search(self, index: Any) -> None:
        if not self.search:
            return
        try:
            _import_faiss().ParameterSpace().set_index_parameters(index, self.search)
        except RuntimeError as error:
            raise InputError(
                f"retriever.search={self.search!r} does not fit retriever.factory={self.factory!r}: "
                f"FAISS says {_reason(error)!r}; use nprobe=16 for IVF, efSearch=64 for HNSW, '' for Flat"
            ) from error

    def _training_rows(self, size: int, index: Any) -> Int[np.ndarray, " rows"]:
        """A uniform sample, in the order of the memory. FAISS needs tens of documents per cell and per code word."""
        ivf = _import_faiss().try_extract_index_ivf(index)
        wanted = max(100_000, 64 * ivf.nlist if ivf is not None else 0)
        if wanted >= size:
            return np.arange(size)
        return np.sort(np.random.default_rng(self.seed).choice(size, wanted, replace=False, shuffle=False))


@dataclass(frozen=True)
class FaissIndex:
    config: Faiss
    part: MemoryPart
    index: Any  # None for an empty part
    keeps_vectors: bool  # its scores are exact

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Inner products (float32, descending) and rows; see `Index.search`. Uses all CPU cores.

        Of documents that tie for the last place, any may be dropped.
        """
        wanted = min(k, len(self.part))
        scores, rows = no_candidates(len(queries), k)
        if self.index is None or len(queries) == 0 or wanted == 0:
            return scores, rows
        embeddings = np.ascontiguousarray(queries.embeddings, np.float32)
        ask = wanted if self.keeps_vectors else min(max(wanted, self.config.reorder_num_neighbors), len(self.part))
        products, found = self.index.search(embeddings, ask)
        if self.keeps_vectors:
            products = np.where(found < 0, np.float32(-np.inf), products)  # FAISS gives the lowest float
        else:
            products = self.part.inner_products(embeddings, found)
        scores[:, :wanted], rows[:, :wanted] = ranked(products, found, wanted)
        return scores, rows


def _reason(error: RuntimeError) -> str:
    """FAISS's reason, without its source location."""
    return " ".join(str(error).split("failed: ")[-1].split(".cpp:")[-1].split(": ", 1)[-1].split())


def _import_faiss() -> Any:
    """Import faiss. Raises InputError: it does not import."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            f"retriever:faiss cannot import the faiss package ({error}); pip install 'rac3[faiss]'"
        ) from error
    return faiss
