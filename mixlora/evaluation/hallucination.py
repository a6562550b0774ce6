"""How often a model says that something is there that is not, from yes or no questions (POPE, arXiv 2305.10355)."""

from collections.abc import Iterable
from dataclasses import dataclass

from mixlora.evaluation.metrics import said_yes_no


@dataclass(frozen=True)
class YesNo:
    """Answers to yes or no questions, counted; one that says neither counts as wrong, and as no "yes".

    Attributes:
        right_yes, wrong_yes: said yes where it is so, and where it is not.
        right_no: said no where it is not so.
        yes, no: questions whose answer is yes, or no.
    """

    right_yes: int
    wrong_yes: int
    right_no: int
    yes: int
    no: int

    @classmethod
    def count(cls, pairs: Iterable[tuple[str, bool]]) -> "YesNo":
        """From answers as they were given, each with whether yes is right."""
        said = [(said_yes_no(answer), truth) for answer, truth in pairs]
        return cls(
            right_yes=said.count(("yes", True)),
            wrong_yes=said.count(("yes", False)),
            right_no=said.count(("no", False)),
            yes=sum(truth for _, truth in said),
            no=sum(not truth for _, truth in said),
        )

    def figures(self) -> dict[str, float]:
        """`accuracy`; `f1` of yes; `yes_share`, of all answers; `wrong_yes`, the share of questions with no as answer
        that were answered yes. 0 where there is nothing to count."""
        told = self.right_yes + self.wrong_yes
        return {
            "accuracy": _share(self.right_yes + self.right_no, self.yes + self.no),
            "f1": _share(2 * self.right_yes, told + self.yes),
            "yes_share": _share(told, self.yes + self.no),
            "wrong_yes": _share(self.wrong_yes, self.no),
        }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
