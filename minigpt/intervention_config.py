"""Options of interventions: heads to ablate, and heads or layers to patch."""

from dataclasses import dataclass
from typing import Literal

from minigpt.fields import check_fields, option, require


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """Heads that are ablated, and heads or layers patched from a run on another prompt."""

    ablate: str | None = option(None, group="Interventions", metavar="LIST", shown="none")
    """Heads to ablate (output set to 0), as layer.head: 1.3,0.*. None for none."""
    ablate_mean: bool = option(False, group="Interventions")
    """Set the output of ablated heads to its mean over the prompt, not to 0."""
    patch_from: str | None = option(None, group="Interventions", metavar="PROMPT", shown="none")
    """Prompt of the same token length, whose activations are patched in. None for none."""
    patch: str | None = option(None, group="Interventions", metavar="LIST", shown="none")
    """Heads to patch, as layer.head, or layers (residual stream): 3.1,2.*,4. None for none."""
    patch_position: int | Literal["all"] | None = option(
        None, "[0, inf)", group="Interventions", shown="the last of the prompt"
    )
    """Prompt position to patch, or all. None for the last."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.ablate is not None or not self.ablate_mean,
            "--ablate-mean has no effect without --ablate. Add --ablate, or leave "
            "--ablate-mean out.",
        )
        require(
            (self.patch_from is None) == (self.patch is None),
            "--patch-from and --patch belong together: a prompt, and what to take from its run. "
            "Give both.",
        )
        require(
            self.patch_position is None or self.patch is not None,
            "--patch-position has no effect without --patch-from. Add --patch-from, or leave "
            "--patch-position out.",
        )

    @property
    def is_any(self) -> bool:
        """Whether there is an intervention."""
        return self.ablate is not None or self.patch is not None

    def __str__(self) -> str:
        """Return a description, as in ``head 1.3 set to 0``."""
        parts = []
        if self.ablate is not None:
            what, their = ("heads", "their") if _is_several(self.ablate) else ("head", "its")
            value = f"{their} mean over the prompt" if self.ablate_mean else "0"
            parts.append(f"{what} {self.ablate} set to {value}")
        if self.patch is not None:
            places: dict[object, str] = {None: "the last position", "all": "every position"}
            place = places.get(self.patch_position, f"position {self.patch_position}")
            end = "s" if _is_several(self.patch) else ""
            kinds = {("head" if "." in part else "layer") + end for part in self.patch.split(",")}
            what = f"{' and '.join(sorted(kinds))} {self.patch}"
            parts.append(f"{what} patched at {place} from {self.patch_from!a}")
        return "; ".join(parts)


def _is_several(heads: str) -> bool:
    return any(mark in heads for mark in ",*-")
