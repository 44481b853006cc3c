"""A stamp is held by one model alone."""

import pytest

from flexolmo_hf.modeling.stamp import Stamp
from tests.modeling.test_expert_sets import COPIES


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_what_is_copied_together_has_one_new_stamp(copied):
    stamp = Stamp()
    first, second = copied((stamp, [stamp]))

    assert first is second[0]
    assert first.id not in (stamp.id, copied(stamp).id, Stamp().id)
