"""What the controller's metrics make of events."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from controller.request_metrics import RequestObserver
from pdserve.errors import KvCorrupt, LayoutMismatch, LeaseExpired, TransferFailed
from service_kit.metrics import Metrics


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransferFailed("The peer is gone."), "connection"),
        (KvCorrupt("One block is not what was announced."), "checksum"),
        (LeaseExpired("Nobody renewed it."), "timeout"),
        (LayoutMismatch("They serve different models."), "refused"),
    ],
)
def test_a_failed_hand_off_is_counted_by_its_kind(error: TransferFailed | LayoutMismatch, kind: str) -> None:
    metrics = Metrics("tiny")
    RequestObserver(metrics).transfer_failed(error)
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    totals = [sample for sample in families["pdserve_kv_transfer_failures"].samples if sample.name.endswith("_total")]
    assert [(sample.labels, sample.value) for sample in totals] == [({"kind": kind}, 1.0)]
