"""What AttnRL shows of its trees: a picture at each log and in the card, and leaves in the table of completions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..base.exhibits import Picture
from .pictures import plot_trees
from .rollouts import PromptRollouts
from .rows import LeafValues
from .trees import tree_paths


CARD_PICTURE = "trees.png"
_LEGEND = (
    "The trees of one prompt of the run's last batch. A bar is a segment of a completion, coloured by its value V(s) "
    "and labelled with its advantage A(s). Continuations hang below the rollout they were branched from; above it: "
    "how much later steps attend to each step."
)


class ReportsMixin:
    """Reports of `AttnRLTrainer`."""

    _shown: PromptRollouts | None = None  # the prompt that pictures are made of, on the first rank

    def _offer_trees(self, prompts: Sequence[PromptRollouts]) -> None:
        """Keep the prompt that shows most, for the card and the picture at the next log."""
        if not self.ranks.is_first or not prompts:
            return
        shown = max(prompts, key=shows_most)
        self._shown = shown
        if self.args.log_trees:
            self.exhibits.offer("trees", lambda: Picture(lambda path: plot_trees(shown, problem_of(shown), path)))

    def card_sections(self, folder: Path) -> dict[str, str]:
        sections = super().card_sections(folder)
        picture = folder / CARD_PICTURE
        if self._shown is not None and self._shown.continuations:
            plot_trees(self._shown, problem_of(self._shown), picture)
        if picture.exists():
            sections["## Trees"] = f"![Trees of one prompt]({CARD_PICTURE})\n\n{_LEGEND}"
        return sections

    def _log_completions(
        self, prompts: Sequence[PromptRollouts], values_of: Sequence[LeafValues], credit: Mapping[str, float]
    ) -> None:
        """Add all leaves of a batch to the completions table, each with the advantage of its own last segment.

        `tree` names the leaf's tree by draw and rollout, `branch` is how many tokens it has from the rollout (0: it is
        the rollout), `credit` the mean factor of a leaf that is trained on under a credit method.

        Args:
            prompts: of all ranks.
            values_of: what their leaves are worth.
            credit: mean factor by `TrainingRow.key`.
        """
        logs = self._logs
        for prompt, values in zip(prompts, values_of, strict=True):
            for path, leaf in zip(tree_paths(prompt.trees(values.rewards)), prompt.leaves, strict=True):
                (completion,) = self._as_completions(prompt.example["prompt"], [prompt.prompt_ids], [path.tokens])
                tree = f"{prompt.draw.serial}/{path.tree}"
                told = leaf.extra | {"tree": tree, "branch": getattr(leaf, "offset", 0)}
                if self.credit is not None:
                    told["credit"] = credit.get(f"{tree}/{path.leaf}")
                self.own_columns |= told.keys() - leaf.extra.keys()
                for column in [name for name in told if name not in logs["extra"]]:
                    logs["extra"][column].extend([None] * len(logs["prompt"]))
                logs["prompt"].append(prompt.example["prompt"])
                logs["completion"].append(completion)
                logs["advantages"].append(path.advantages[-1])
                for name, reward in zip(self.reward_func_names, leaf.rewards.tolist(), strict=True):
                    logs["rewards"][name].append(reward)
                for column, column_values in logs["extra"].items():
                    column_values.append(told.get(column))


def shows_most(prompt: PromptRollouts) -> tuple[int, ...]:
    """What makes a prompt worth a picture: leaves that differ, then branch points that are not the first steps."""
    mixed = prompt.num_mixed_trees
    return int(mixed > 0), prompt.num_later_points, mixed, len(prompt.continuations)


def problem_of(prompt: PromptRollouts) -> str:
    """The text of a prompt: of a conversation its last message."""
    text = prompt.example["prompt"]
    return text if isinstance(text, str) else text[-1]["content"]
