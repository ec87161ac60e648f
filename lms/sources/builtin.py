"""The built-in tasks: well-known data sets, where they are, and what their rows look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lms.sources.data_rows import DataRow, DataRows
from lms.sources.forms import Form, arc, gsm8k, math500, mmlu_pro, squad


@dataclass(frozen=True)
class BuiltIn:
    """A data set of the Hugging Face Hub that needs no flags."""

    hub: str
    """The name of the data set on the hub: OWNER/NAME or OWNER/NAME:CONFIG."""
    scorer: str
    """The answer rule for its answers."""
    form: Form
    """The function that reads its rows."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The splits that are used as other ones, by their own names; "" stands for not used."""

    def rename(self, rows: DataRows) -> DataRows:
        """Returns rows with the splits that they are used as."""

        def each() -> Iterator[tuple[str, str, DataRow]]:
            for own, place, row in rows():
                split = self.renamed.get(own, own)
                if split or not own:
                    yield split, place, row

        return each


BUILT_INS = {
    "gsm8k": BuiltIn("openai/gsm8k:main", "number", gsm8k),
    "math500": BuiltIn("HuggingFaceH4/MATH-500", "latex", math500),
    "arc_challenge": BuiltIn("allenai/ai2_arc:ARC-Challenge", "choice", arc),
    # The validation split of MMLU-Pro is 70 worked examples for the prompt.
    "mmlu_pro": BuiltIn("TIGER-Lab/MMLU-Pro", "choice", mmlu_pro, {"dev": ""}),
    # The test split of SQuAD is kept secret.
    "squad": BuiltIn("rajpurkar/squad", "text", squad, {"dev": "test"}),
}
