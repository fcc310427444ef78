"""Approximate maximum inner product search with ScaNN on CPU: the default, for a memory of any size."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Needs, Queries, check_num_neighbors, no_candidates, ranked, search_only

_BRUTE_FORCE_BELOW = 20_000  # documents, as ScaNN advises
_QUANTIZED_FROM = 16  # documents: to train the 16 centers of each block's codebook


@dataclass(frozen=True)
class Scann:
    """Brute force for a small part; else a tree of 4-bit codes, then exact scores for the best candidates.

    `spherical` scales the centers of the leaves to norm 1. CLIP embeddings fill a narrow cone; without it, a query
    finds the leaves with the longest centers instead of the nearest ones.

    A build holds the float32 embeddings of a part in host memory: add a large memory in parts. An open index holds the
    codes (1/16 of float32 at two dimensions per block) and the embeddings as `reorder_dtype`. With "none" it holds only
    the codes, and each search reads its candidates' embeddings from the memory, possibly from disk. Scores are float32
    inner products for any `reorder_dtype`; bfloat16 and int8 only affect which documents come last among the neighbors.
    Brute force keeps float32. Two builds of a tree differ slightly; a written index gives the same results every time.

    `num_leaves_to_search` and `reorder_num_neighbors` do not affect the build: open an index with other values for more
    recall or more speed.

    Reference: Guo et al., Accelerating Large-Scale Inference with Anisotropic Vector Quantization (arXiv 1908.10396);
    Sun et al., SOAR: Improved Indexing for Approximate Nearest Neighbor Search (arXiv 2404.00774).
    """

    num_neighbors: int = search_only(16)
    num_leaves: int | None = None  # None: brute force below 20,000 documents, else 3 times their square root
    num_leaves_to_search: int | None = search_only(None)  # None: 1 in 20
    spherical: bool = True
    soar_lambda: float | None = None  # if set, SOAR puts each document into a second leaf; 1 to 1.5 is usual
    dimensions_per_block: int = 2  # embedding dimensions that share one 4-bit code
    anisotropic_quantization_threshold: float = 0.2
    reorder_num_neighbors: int = search_only(128)  # candidates by code that get exact scores
    reorder_dtype: Literal["float32", "bfloat16", "int8", "none"] = "float32"  # of the embeddings for exact scores

    def __post_init__(self) -> None:
        check_num_neighbors(self.num_neighbors)
        positive = {
            "num_leaves": self.num_leaves,
            "num_leaves_to_search": self.num_leaves_to_search,
            "dimensions_per_block": self.dimensions_per_block,
        }
        if self.soar_lambda is not None and self.soar_lambda <= 0:
            raise InputError(f"retriever.soar_lambda={self.soar_lambda} is not positive; use 1 to 1.5, or None for off")
        for field, value in positive.items():
            if value is not None and value < 1:
                raise InputError(f"retriever.{field}={value} is below 1; use at least 1")
        if self.num_leaves and self.num_leaves_to_search and self.num_leaves_to_search > self.num_leaves:
            raise InputError(
                f"retriever.num_leaves_to_search={self.num_leaves_to_search} exceeds "
                f"retriever.num_leaves={self.num_leaves}; use at most that, about 1 in 20"
            )
        if self.reorder_num_neighbors < self.num_neighbors:
            raise InputError(
                f"retriever.reorder_num_neighbors={self.reorder_num_neighbors} is below "
                f"retriever.num_neighbors={self.num_neighbors}; use at least that, about 8 times as many"
            )
        if self.reorder_dtype not in ("float32", "bfloat16", "int8", "none"):
            raise InputError(
                f"retriever.reorder_dtype={self.reorder_dtype!r} is unknown; use float32, bfloat16, int8 or none"
            )

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write ScaNN's files, with paths relative to `folder`; nothing for an empty part.

        Raises:
          InputError: `num_leaves` exceeds the number of documents, or scann does not import.
        """
        size = len(part)
        if size == 0:
            return
        leaves = self.leaves_for(size)
        scann = _import_scann()
        builder = scann.scann_ops_pybind.builder(part.read(slice(0, size)), self.num_neighbors, "dot_product")
        if leaves is None or size < _QUANTIZED_FROM:
            builder = builder.score_brute_force()
        else:
            builder = builder.tree(
                num_leaves=leaves,
                num_leaves_to_search=self._searched(leaves),
                # k-means needs tens of points per center: ScaNN's default of 100,000 is too few for 12,000 leaves.
                training_sample_size=max(100_000, 40 * leaves),
                spherical=self.spherical,
                soar_lambda=self.soar_lambda,
            ).score_ah(
                self.dimensions_per_block,
                anisotropic_quantization_threshold=self.anisotropic_quantization_threshold,
            )
            if self.reorder_dtype != "none":
                kept_as = scann.ReorderType[self.reorder_dtype.upper()]
                builder = builder.reorder(self.reorder_num_neighbors, quantize=kept_as)
        builder.build().serialize(str(folder), relative_path=True)

    def open(self, part: MemoryPart, folder: Path) -> "ScannIndex":
        if len(part) == 0:
            return ScannIndex(self, part, None)
        # As scann's load_searcher, but never loads a pickle from the folder.
        pybind = _import_scann().scann_ops_pybind
        assets = (folder / "scann_assets.pbtxt").read_text(encoding="utf-8")
        return ScannIndex(self, part, pybind.ScannSearcher(pybind.scann_pybind.ScannNumpy(str(folder), assets)))

    def needs(self, documents: int, width: int) -> Needs:
        """The build runs ten rounds of k-means on a sample, then assigns and encodes every vector.

        A query scores all centers, the codes of the searched leaves (one FLOP per table look-up) and the candidates.
        """
        vectors = 4.0 * documents * width
        kept = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.25, "none": 0.0}[self.reorder_dtype] * vectors
        leaves = self.leaves_for(documents)
        if leaves is None:
            return Needs(2 * vectors, vectors, disk_bytes=vectors, query_flops=2.0 * documents * width)
        codes = documents * width / self.dimensions_per_block / 2 * (1 if self.soar_lambda is None else 2)
        sample = min(documents, max(100_000, 40 * leaves))
        return Needs(
            build_bytes=vectors + kept + codes,
            search_bytes=kept + codes,
            disk_bytes=kept + 2 * codes,  # one byte per code in the file
            build_flops=2.0 * leaves * width * (10 * sample + documents),
            query_flops=2.0 * leaves * width
            + documents * self._searched(leaves) / leaves * width / self.dimensions_per_block
            + 2.0 * self.reorder_num_neighbors * width,
        )

    def effort(self, documents: int) -> str:
        """How many leaves a query visits, where there are any."""
        leaves = self.leaves_for(documents)
        return "" if leaves is None else f"retriever.num_leaves_to_search={self._searched(leaves)}"

    def efforts(self, documents: int) -> dict[str, "Scann"]:
        """Leaves to search: from about one in a hundred, doubling up to all."""
        leaves = self.leaves_for(documents)
        if leaves is None:
            return {}
        searched = sorted({min(leaves, max(1, leaves // 128) * 2**step) for step in range(9)})
        return {f"{each} of {leaves} leaves": replace(self, num_leaves_to_search=each) for each in searched}

    def leaves_for(self, size: int) -> int | None:
        """Leaves of the tree over `size` documents; None for brute force.

        Raises:
          InputError: `num_leaves` exceeds `size`.
        """
        if self.num_leaves is None:
            return None if size < _BRUTE_FORCE_BELOW else _leaves_of(size)
        if self.num_leaves > size:
            raise InputError(
                f"retriever.num_leaves={self.num_leaves} exceeds the {size} documents of this part of the memory; "
                f"use at most {size}, about {_leaves_of(size)}, or None to choose by size"
            )
        return self.num_leaves

    def _searched(self, leaves: int) -> int:
        """Leaves to search per query."""
        return min(self.num_leaves_to_search or math.ceil(leaves / 20), leaves)


def _leaves_of(size: int) -> int:
    """Three times as many leaves as ScaNN advises.

    Two to three times as fast at equal recall on vectors like CLIP's, a third slower on plain clusters
    (`benchmarks/retrieval.py`).
    """
    return min(size, round(3 * math.sqrt(size)))


@runtime_checkable
class _Searcher(Protocol):
    def search_batched_parallel(
        self,
        queries: np.ndarray,
        final_num_neighbors: int,
        pre_reorder_num_neighbors: int,
        leaves_to_search: int | None,
    ) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class ScannIndex:
    config: Scann
    part: MemoryPart
    searcher: _Searcher | None  # None for an empty part

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Inner products (float32, descending) and rows; see `Index.search`. Uses all CPU cores.

        Of documents that tie for the last place, any may be dropped.
        """
        wanted = min(k, len(self.part))
        scores, rows = no_candidates(len(queries), k)
        if self.searcher is None or len(queries) == 0 or wanted == 0:
            return scores, rows
        embeddings = np.ascontiguousarray(queries.embeddings, np.float32)
        size, config = len(self.part), self.config
        leaves = config.leaves_for(size)
        candidates = min(max(wanted, config.reorder_num_neighbors), size)
        found, products = self.searcher.search_batched_parallel(
            embeddings,
            final_num_neighbors=candidates if config.reorder_dtype == "none" else wanted,
            pre_reorder_num_neighbors=candidates,
            leaves_to_search=None if leaves is None else config._searched(leaves),
        )
        missing = np.isnan(products)  # the searched leaves hold fewer documents; the row is 0 there
        found = np.where(missing, -1, found.astype(np.int64))
        if config.reorder_dtype != "float32":
            products = self.part.inner_products(embeddings, found)
        products = np.where(missing, np.float32(-np.inf), products)
        scores[:, :wanted], rows[:, :wanted] = ranked(products, found, wanted)
        return scores, rows


def _import_scann() -> ModuleType:
    """Import scann. Raises InputError: it does not import, for example on a system other than Linux."""
    try:
        import scann
    except ImportError as error:
        raise InputError(
            f"retriever:scann cannot import the scann package ({error}); it is built for Linux: pip install scann, "
            "or use retriever:exact"
        ) from error
    return scann
