"""The exception tree, as hosts extend it."""

from __future__ import annotations

import orchestrator
from orchestrator.errors import CLASSES, Busy


def test_every_class_of_errors_is_exported() -> None:
    """A host catches it by that name."""
    ours = [one for one in CLASSES.values() if one.__module__ == "orchestrator.errors"]
    assert len(ours) > 20
    for one in ours:
        assert one.__name__ in orchestrator.__all__
        assert getattr(orchestrator, one.__name__) is one


def test_subclass_of_a_host_keeps_its_own_category_and_status() -> None:
    """A host may answer its own refusals like ours; ours keep their class."""

    class QuotaExceeded(Busy):
        category = "quota_exceeded"
        status = 429

    error = QuotaExceeded.because("no tokens are left today")
    assert (error.problem.category, QuotaExceeded.status) == ("quota_exceeded", 429)
    assert CLASSES["busy"] is Busy
