"""What the values of an audit were measured of, for figures: curves of scores, and images beside the true ones."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from fedsim.privacy.kept import Run
from fedsim.privacy.measures import Told, roc
from fedsim.results.pictures import TRUE, name_of
from fedsim.results.records import CurveRecord


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Of one attack on one participant, or, with `client` None, on several."""

    round: int
    attack: str
    knowledge: str
    client: int | None
    told: Told


def curves(run: Run, evidence: Sequence[Evidence]) -> Iterator[CurveRecord]:
    """The curve of every attack that gave scores, and that of all participants' scores as one (`client` None)."""
    whole = SimpleNamespace(run_id=run.run_id, experiment=run.experiment, method=run.method)
    of_attack: dict[tuple[str, str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for each in evidence:
        if each.told.scores is not None:
            attack = each.attack, each.knowledge, each.round
            of_attack.setdefault(attack, []).append(each.told.scores)
            yield from (CurveRecord(whole, *attack, each.client, *point) for point in roc(*each.told.scores))
    for attack, scores in of_attack.items():
        members, others = (np.concatenate(part) for part in zip(*scores, strict=True))
        yield from (CurveRecord(whole, *attack, None, *point) for point in roc(members, others))


def pictures(evidence: Iterable[Evidence]) -> dict[str, np.ndarray]:
    """Images by name, as `fedsim.results.pictures` keeps them: of every attack that found one, and the true one."""
    found = {}
    for each in evidence:
        if each.told.images is not None:
            true, image = each.told.images
            found[name_of(each.round, each.attack, each.knowledge)] = _bytes(image)
            found[name_of(each.round, TRUE)] = _bytes(true)
    return found


def _bytes(image: Tensor) -> np.ndarray:
    """`(C, H, W)` from 0 to 1 as `(H, W, C)` from 0 to 255."""
    return (255 * image.detach().permute(1, 2, 0)).round().byte().numpy()
