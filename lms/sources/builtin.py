"""Well-known data sets: where they are, and what their rows look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lms.sources.forms import Form, arc, gsm8k, math500, mmlu_pro, squad
from lms.sources.rows import Row, Rows


@dataclass(frozen=True)
class BuiltIn:
    """A data set of the Hugging Face Hub that needs no flags."""

    hub: str
    """OWNER/NAME or OWNER/NAME:CONFIG."""
    scorer: str
    form: Form
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What its own splits are used as, where it differs; "" is not used."""

    def rename(self, rows: Rows) -> Rows:
        """Rows with the splits that they are used as."""

        def each() -> Iterator[tuple[str, str, Row]]:
            for own, place, row in rows():
                split = self.renamed.get(own, own)
                if split or not own:
                    yield split, place, row

        return each


BUILT_INS = {
    "gsm8k": BuiltIn("openai/gsm8k:main", "number", gsm8k),
    "math500": BuiltIn("HuggingFaceH4/MATH-500", "latex", math500),
    "arc_challenge": BuiltIn("allenai/ai2_arc:ARC-Challenge", "choice", arc),
    # Its validation split is 70 worked examples for the prompt.
    "mmlu_pro": BuiltIn("TIGER-Lab/MMLU-Pro", "choice", mmlu_pro, {"dev": ""}),
    # Its test split is kept secret.
    "squad": BuiltIn("rajpurkar/squad", "text", squad, {"dev": "test"}),
}
