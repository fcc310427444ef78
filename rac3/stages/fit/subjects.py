"""Which documents of a fit show the same subject, and which two of them meet."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from rac3.config import InputError
from rac3.documents.document import Document
from rac3.evaluation.entities import entity_of

DRAWS = 2**16  # of the other document: far more than a subject has, so that each is as likely as the others


@dataclass(frozen=True)
class Subjects:
    """The subject of each document, as a number; documents without one are alone in theirs.

    A row stands for a document and another of its subject: row r for document r % documents and one that r // documents
    draws. A fit draws nothing but rows, so whom a document meets is a function of (seed, step) too.
    """

    numbers: Int[np.ndarray, " documents"]
    members: Sequence[Int[np.ndarray, " members"]] = field(init=False)  # the documents of each, ascending

    def __post_init__(self) -> None:
        members = defaultdict(list)
        for document, number in enumerate(self.numbers.tolist()):
            members[number].append(document)
        object.__setattr__(self, "members", [np.array(members[number]) for number in range(len(members))])

    @classmethod
    def of(cls, documents: Sequence[Document], field: str) -> "Subjects":
        """As the metadata `field` names them.

        Raises:
          InputError: no document has it.
        """
        names = [entity_of(document, field) for document in documents]
        if not any(names):
            raise InputError(
                f"clip.subject_field={field!r} is in the metadata of none of the {len(documents)} documents; name "
                "another field, or '' for none"
            )
        known: dict[Any, int] = {}
        numbers = [known.setdefault(name or place, len(known)) for place, name in enumerate(names)]
        return cls(np.array(numbers, np.int32))

    @property
    def rows(self) -> int:
        return len(self.numbers) * DRAWS

    def pairs(self, rows: Int[np.ndarray, " rows"]) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        """The document of each row, and the other one: itself where its subject has no other."""
        documents, draws = rows % len(self.numbers), rows // len(self.numbers)
        others = []
        for document, draw in zip(documents.tolist(), draws.tolist(), strict=True):
            own = self.members[self.numbers[document]]
            place = int(np.searchsorted(own, document))
            others.append(own[(place + 1 + draw % max(1, len(own) - 1)) % len(own)])
        return documents, np.array(others)
