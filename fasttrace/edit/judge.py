"""Judging an edit: the same prompts and seeds before and after, read by something that the edit cannot touch.

*Efficacy* is the share of pictures of target prompts in which the old value is gone, *specificity* the share of
pictures of other prompts whose reading stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import EditError
from ..metrics.scorers import Scorer, clip_scores
from ..pipeline import decode_latents
from .edit import Edit

ABOUT = ("target", "paraphrase", "neighbour", "unrelated")


@dataclass(frozen=True)
class Case:
    """A prompt to judge an edit by.

    Args:
        text: the prompt.
        about: ``"target"``: one the edit was fitted for, ``"paraphrase"``: the old concept in other words,
            ``"neighbour"``: a related concept, ``"unrelated"``.
        wanted: for targets and paraphrases, the prompt that ``text`` should now be read as.
    """

    text: str
    about: str
    wanted: str = ""

    def __post_init__(self) -> None:
        if self.about not in ABOUT:
            raise EditError(f"about={self.about!r}: expected one of {', '.join(ABOUT)}")
        if self.is_target != bool(self.wanted):
            raise EditError(f"{self.text!r} ({self.about}): targets and paraphrases have wanted=, others do not")

    @property
    def is_target(self) -> bool:
        return self.about in ABOUT[:2]


class Reader(Protocol):
    """What says whether a picture still shows the old concept, and whether two pictures show the same."""

    def gone(self, pictures: Tensor, cases: Sequence[Case]) -> Tensor:
        """``[N]`` bool: the old concept is not in the picture."""

    def became(self, pictures: Tensor, cases: Sequence[Case]) -> Tensor:
        """``[N]`` bool: the picture shows what the edit should make of it."""

    def changed(self, before: Tensor, after: Tensor, cases: Sequence[Case]) -> Tensor:
        """``[N]`` bool: the two pictures are read differently."""


class AttributeReader:
    """Reads by a classifier of attributes, such as the packaged model's judge.

    Args:
        read: pictures ``[N, 3, H, W]`` to one ``{attribute: value}`` each.
        attribute: the edited attribute.
        old: its value that should be gone.
        new: the value that should be there instead.
    """

    def __init__(self, read: Callable[[Tensor], list[dict[str, str]]], attribute: str, old: str, new: str) -> None:
        self._read, self._attribute, self._old, self._new = read, attribute, old, new

    def gone(self, pictures: Tensor, cases: Sequence[Case]) -> Tensor:
        return torch.tensor([found[self._attribute] != self._old for found in self._read(pictures)])

    def became(self, pictures: Tensor, cases: Sequence[Case]) -> Tensor:
        return torch.tensor([found[self._attribute] == self._new for found in self._read(pictures)])

    def changed(self, before: Tensor, after: Tensor, cases: Sequence[Case]) -> Tensor:
        """Any attribute is read differently, not only the edited one."""
        return torch.tensor([a != b for a, b in zip(self._read(before), self._read(after), strict=True)])


class ScoreReader:
    """Reads by CLIP scores, for models without a classifier: a picture shows the prompt that it scores highest with.

    Args:
        scorer: frozen and apart from the pipeline.
        texts: all prompts that are judged; a picture has changed if another of them fits it best.
    """

    def __init__(self, scorer: Scorer, texts: Sequence[str]) -> None:
        self._scorer, self._features = scorer, scorer.text_features(list(dict.fromkeys(texts)))

    def gone(self, pictures: Tensor, cases: Sequence[Case]) -> Tensor:
        old = clip_scores(self._scorer, pictures, [case.text for case in cases])
        new = clip_scores(self._scorer, pictures, [case.wanted or case.text for case in cases])
        return new > old

    def became(self, pictures: Tensor, cases: Sequence[Case]) -> Tensor:
        return self.gone(pictures, cases)

    def changed(self, before: Tensor, after: Tensor, cases: Sequence[Case]) -> Tensor:
        best = [(self._scorer.image_features(p) @ self._features.T).argmax(-1) for p in (before, after)]
        return best[0] != best[1]


@dataclass(frozen=True)
class Judgement:
    """What judging found.

    Attributes:
        table: one row a (prompt, seed): ``about, prompt, wanted, seed, gone_before, gone_after, became, changed,
            clip_before, clip_after, clip_wanted``: CLIP scores of the pictures with the prompt itself, and of the one
            after the edit with ``wanted``. What does not apply is missing.
        before: pictures ``[N, 3, H, W]`` in [0, 1], in the table's order.
        after: the same prompts and seeds under the edit.
    """

    table: Any
    before: Tensor
    after: Tensor

    @property
    def efficacy(self) -> float:
        """Share of target and paraphrase pictures in which the old concept is gone."""
        return float(self.table[self.table["about"].isin(ABOUT[:2])]["gone_after"].astype(float).mean())

    @property
    def specificity(self) -> float:
        """Share of unrelated pictures that are read as before."""
        return 1.0 - float(self.table[self.table["about"] == "unrelated"]["changed"].astype(float).mean())

    def summary(self) -> Any:
        """One row for each kind of prompt: pictures, shares and mean CLIP scores."""
        numbers = [name for name in self.table.columns if name not in ("about", "prompt", "wanted", "seed")]
        table = self.table.assign(**{name: self.table[name].astype(float) for name in numbers})
        grouped = table.groupby("about", sort=False)
        result = grouped[numbers].mean()
        result.insert(0, "pictures", grouped.size())
        return result.reset_index()


def judge(
    pipe: Any,
    edit: Edit,
    cases: Sequence[Case],
    reader: Reader,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    scorer: Scorer | None = None,
    before: Tensor | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
) -> Judgement:
    """Pictures of every case and seed, before and under the edit, and what they show.

    Args:
        pipe: the pipeline; it is left as it was.
        edit: the edit.
        cases: prompts of all kinds that are to be reported.
        reader: says what pictures show.
        seeds: of the latents; both sides start from the same ones.
        scorer: for CLIP scores.
        before: pictures of the unedited model from an earlier judgement with the same cases and seeds.

    Raises:
        EditError: no cases or seeds, or an edit for another model.
    """
    import pandas as pd

    if not cases or not seeds:
        raise EditError("judge: expected at least one case and one seed")
    rows = [(case, seed) for case in cases for seed in seeds]
    asked, number = [case for case, _ in rows], [seed for _, seed in rows]

    def make() -> Tensor:
        return pictures(pipe, [case.text for case in asked], number, num_inference_steps, guidance_scale)

    before = make() if before is None else before
    with edit.applied(pipe):
        after = make()
    target = torch.tensor([case.is_target for case in asked])
    gone = [reader.gone(side, asked) for side in (before, after)]
    columns: dict[str, Any] = {
        "about": [case.about for case in asked],
        "prompt": [case.text for case in asked],
        "wanted": [case.wanted for case in asked],
        "seed": number,
        "gone_before": _where(target, gone[0]),
        "gone_after": _where(target, gone[1]),
        "became": _where(target, reader.became(after, asked)),
        "changed": reader.changed(before, after, asked).tolist(),
    }
    if scorer is not None:
        columns["clip_before"] = clip_scores(scorer, before, [case.text for case in asked]).tolist()
        columns["clip_after"] = clip_scores(scorer, after, [case.text for case in asked]).tolist()
        columns["clip_wanted"] = _where(target, clip_scores(scorer, after, [c.wanted or c.text for c in asked]))
    return Judgement(pd.DataFrame(columns), before, after)


def _where(mask: Tensor, values: Tensor) -> list[Any]:
    return [value if is_target else None for value, is_target in zip(values.tolist(), mask.tolist(), strict=True)]


@torch.no_grad()
def pictures(
    pipe: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    max_batch: int = 32,
) -> Tensor:
    """``[N, 3, H, W]`` in [0, 1], as the pipeline makes them of each text and seed by itself."""
    final = []
    for start in range(0, len(texts), max_batch):
        batch = slice(start, start + max_batch)
        final.append(
            pipe(
                list(texts[batch]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images
        )
    return decode_latents(pipe, torch.cat(final))
