"""``site="auto"``: trace, then edit there."""

from __future__ import annotations

from typing import Any

from ..errors import EditError
from ..sites import TEXT_PARTS

_EDITABLE = ("self_attn", "mlp")


def strongest_text_site(effects: Any) -> str:
    """The text site, attention or MLP, with the largest average indirect effect at any one token role.

    Args:
        effects: `fasttrace.Effects` of a text trace, or its table.

    Raises:
        EditError: no effects; several metrics, whose scales differ; no attention or MLP of a text encoder among them.
    """
    if effects is None:
        raise EditError('site="auto" needs effects=, the result of a text trace')
    table = effects.to_pandas() if hasattr(effects, "to_pandas") else effects
    rows = table[table["part"].isin(TEXT_PARTS) & table["kind"].isin(_EDITABLE)]
    if rows.empty:
        raise EditError(
            'site="auto": these effects have no self_attn or mlp site of a text encoder; trace sites="text"'
        )
    metrics = sorted(rows["metric"].unique())
    if len(metrics) > 1:
        raise EditError(f'site="auto": these effects mix the metrics {", ".join(metrics)}; give the rows of one')
    means = rows.groupby(["site", rows["token_role"].fillna("all")], sort=False)["indirect_effect"].mean().dropna()
    if means.empty:
        raise EditError('site="auto": every indirect effect is missing')
    return str(means.idxmax()[0])
